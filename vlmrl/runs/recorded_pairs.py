"""The pairs of `dpo.from_run`: of each group that a run has recorded, the best rollout against the worst.

    rollouts/*.parquet ─▶ groups ─▶ highest and lowest reward ─▶ held out, by problem? ─▶ train / eval
    a pair ─▶ images/*.png through today's renderer, checked ─▶ Rollout ─▶ make_samples ─▶ PreferencePair

The tokens are those that were sampled, as they are recorded; no text is tokenized again. Images are read when a pair is
learned from. Today's renderer makes their tensors and the first prompt once more, and both must be what was recorded:
otherwise the policy would learn from prompts that it is never shown.

Rollouts are compared by the reward of the episode, and where that is equal by the sum of the rewards of their turns.
A group has no pair where all its rewards are equal, where fewer than two of its rollouts were trained on, and where the
prompts or the answers of the two do not differ as they should (`NO_PAIR`).
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, cast

import numpy as np

from vlmrl.errors import ConfigError
from vlmrl.orchestrator.preferences import PairBatch
from vlmrl.orchestrator.samples import make_samples
from vlmrl.record.rollouts import RolloutRecord
from vlmrl.record.run_dir import RunDir
from vlmrl.rendering.renderer import Renderer
from vlmrl.runs.build import Run
from vlmrl.runs.replay.recorded import RecordedItem, fits, load_items, load_records, rollout_of
from vlmrl.tasks.dataset.order import shuffled
from vlmrl.types import PreferencePair, Rollout

NO_PAIR = {
    "few": "fewer than two rollouts were trained on",
    "ties": "all rewards are equal",
    "prompts": "the first prompts differ",
    "answers": "the answers are equal",
}
"""Why a group has no pair."""


@dataclass(frozen=True, eq=False)
class RecordedPair:
    """The best and the worst rollout of a group."""

    chosen: RolloutRecord
    rejected: RolloutRecord

    @property
    def problem_id(self) -> str:
        return self.chosen["problem_id"]

    @property
    def pair_id(self) -> str:
        return self.chosen["rollout_id"].rpartition("/")[0]


def pairs_of_step(records: Sequence[RolloutRecord], without: Counter[str]) -> Iterator[RecordedPair]:
    """The pairs of a step's groups. `without` counts the groups that have none, by the keys of `NO_PAIR`."""
    for _, members in groupby(records, lambda record: record["rollout_id"].rpartition("/")[0]):
        usable = [record for record in members if record["dropped"] is None and record["turns"]]
        if len(usable) < 2:
            without["few"] += 1
            continue
        chosen, rejected = max(usable, key=_reward), min(usable, key=_reward)  # of equal ones, the first
        if _reward(chosen) == _reward(rejected):
            without["ties"] += 1
        elif _first_prompt(chosen) != _first_prompt(rejected):
            without["prompts"] += 1
        elif _answers(chosen) == _answers(rejected):
            without["answers"] += 1
        else:
            yield RecordedPair(_compact(chosen), _compact(rejected))


def _reward(record: RolloutRecord) -> tuple[float, float]:
    """The episode's reward; of equal ones, the sum of the rewards of its turns decides."""
    return record["reward"], math.fsum(turn["reward"] for turn in record["turns"])


def _first_prompt(record: RolloutRecord) -> tuple[Any, ...]:
    first = record["turns"][0]
    return first["prompt_token_ids"], first["placeholders"]


def _answers(record: RolloutRecord) -> list[list[int]]:
    return [turn["completion_ids"] for turn in record["turns"]]


def _compact(record: RolloutRecord) -> RolloutRecord:
    """The record with arrays in place of lists of numbers, which take eight times the memory."""
    for turn in record["turns"]:
        fields = cast("dict[str, Any]", turn)
        fields["prompt_token_ids"] = np.array(turn["prompt_token_ids"], np.int32)
        fields["completion_ids"] = np.array(turn["completion_ids"], np.int32)
        fields["logprobs"] = np.array(turn["logprobs"], np.float32)
        fields["versions"] = np.array(turn["versions"], np.int32)
        fields["trainer_logprobs"] = fields["entropies"] = None
    return record


def is_held_out(problem_id: str, fraction: float) -> bool:
    """Whether the pairs of a problem are held out: a function of its id, so all of them are, or none.

    >>> [is_held_out(f"problem {number}", 0.5) for number in range(6)]
    [True, True, False, True, False, False]
    """
    digest = hashlib.blake2b(f"held out/{problem_id}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


@dataclass(eq=False)
class RecordedPairs:
    """The pairs of a recorded run (`vlmrl.runs.dpo.PairSource`)."""

    run: Run
    recorded: RunDir
    train: list[RecordedPair] = field(default_factory=list)
    eval: list[RecordedPair] = field(default_factory=list)
    without: Counter[str] = field(default_factory=Counter)
    """Groups without a pair, by the keys of `NO_PAIR`."""

    @staticmethod
    def of(run: Run) -> RecordedPairs:
        """Read the run of `dpo.from_run`. Raises VlmrlError where it cannot be read, `ConfigError` where it has no pair
        to train on."""
        config = run.config.dpo
        assert config.from_run is not None
        found = RecordedPairs(run, RunDir(config.from_run))
        for step in found.recorded.rollouts_steps("step"):
            for pair in pairs_of_step(load_records(found.recorded, step), found.without):
                side = found.eval if is_held_out(pair.problem_id, config.eval_fraction) else found.train
                side.append(pair)
        if not found.train:
            raise ConfigError(
                f"dpo.from_run={config.from_run} has no pair to train on ({found.table()['groups without a pair']}; "
                f"{len(found.eval)} pairs held out by dpo.eval_fraction={config.eval_fraction:g}): set dpo.from_run "
                "to a run whose rollouts of a group have different rewards"
            )
        return found

    @property
    def num_rows(self) -> int:
        return len(self.train)

    def table(self) -> dict[str, str]:
        """What was read, for the screen."""
        reasons = ", ".join(f"{count} because {NO_PAIR[key]}" for key, count in sorted(self.without.items()))
        return {
            "run": str(self.recorded.path),
            "pairs": f"{len(self.train)}, and {len(self.eval)} held out",
            "groups without a pair": reasons or "none",
        }

    async def batch(self, step: int) -> PairBatch:
        """The pairs of `step`; each pass over them has an order of its own."""
        indices = self.run.position.rl.take(step, self.run.config.dpo.batch_size)
        chosen = [self.train[shuffled(index, len(self.train), self.run.config.seed)] for index in indices]
        made = PairBatch(pairs=await self._made(chosen))
        for number, (index, pair) in enumerate(zip(indices, chosen, strict=True)):
            rollout = Rollout.unplayed(pair.pair_id, "train", index, number)
            rollout.problem_id = pair.problem_id
            made.rollouts.append(rollout)
        return made

    async def held_out(self) -> list[PreferencePair]:
        return await self._made(self.eval[: self.run.config.orchestrator.eval.problems])

    async def _made(self, pairs: Sequence[RecordedPair]) -> list[PreferencePair]:
        records = [record for pair in pairs for record in (pair.chosen, pair.rejected)]
        renderer = self.run.renderer
        items = await asyncio.to_thread(load_items, self.recorded, records, renderer)
        made = []
        for pair in pairs:
            chosen, rejected = (rollout_of(record, items) for record in (pair.chosen, pair.rejected))
            await self._check(chosen, rejected, items, renderer)
            made.append(PreferencePair(pair.pair_id, tuple(make_samples(chosen)), tuple(make_samples(rejected))))
        return made

    async def _check(
        self, chosen: Rollout, rejected: Rollout, items: dict[str, RecordedItem], renderer: Renderer
    ) -> None:
        """Raise `ConfigError` where today's renderer makes other pixels, tensors or first prompts."""
        first = chosen.turns[0]
        prompt = await renderer.first_turn(first.messages, first.tools)
        shown = {item.hash for turn in (*chosen.turns, *rejected.turns) for item in turn.prompt.mm_items}
        wrong = ""
        for item in items.values():
            if item.other_pixels and item.item.hash in shown:
                is_image = item.item.modality == "image"
                wrong = f"the file {item.hash}.png holds other pixels" if is_image else f"{item.other_pixels} is other"
            elif item.changed_tensors and item.item.hash in shown:
                names = ", ".join(item.changed_tensors)
                wrong = f"{names} of the {item.item.modality} {item.hash} are processed in another way"
        if not (fits(chosen) and fits(rejected)):
            wrong = "an image or video takes another number of tokens"
        elif not wrong and not np.array_equal(prompt.token_ids, first.prompt.token_ids):
            wrong = "its first prompt is rendered to other tokens"
        if wrong:
            raise ConfigError(
                f"dpo.from_run={self.recorded.path}: in {chosen.rollout_id}, {wrong} than was recorded, so the policy "
                "would learn from prompts that it is never shown: choose the model and the renderer of that run "
                "(model, model.vlm, orchestrator.renderer)"
            )
