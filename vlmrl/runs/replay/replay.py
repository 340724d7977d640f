"""`mode=replay run=<dir> step=N`: a recorded batch through today's code, line by line along the data path.

    images/*.png ─▶ pictures      the hash that a file is called by
       processor ─▶ tensors       digests noted in the PNGs
        renderer ─▶ prompts       rendered again from the messages, each turn from the one before it as recorded
          engine ─▶ completions   sampled again from the recorded prompts with the run's seeds
                    logprobs, engine   of the tokens that came out the same
         trainer ─▶ logprobs, trainer

What goes into each line is what was *recorded*, not what the line before it made: the first line that differs is where
to look. Engine, device, number format and packing are those of today's config, which is the run's own with the
overrides of the command line on top.

An engine of another kind draws other tokens from the same seed. Then there are no completions to compare, and its
logprobs of the tokens that it draws are held against the trainer's of the same tokens.

The same code on the same device gives the same bits: a batch is what the loop handed over, in its order, so that the
engine forms the batches and the trainer the micro-batches that it formed then. Left out on purpose: the update of the
weights (a resumed run does it again), evaluations, and tokens that other policy versions sampled.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby

import numpy as np

from vlmrl.config.parse import parse, typed
from vlmrl.config.run import RunConfig
from vlmrl.errors import ParityError
from vlmrl.orchestrator.loop import ExitReason
from vlmrl.orchestrator.rollout import sampling_seed
from vlmrl.orchestrator.samples import make_samples
from vlmrl.record.run_dir import RunDir
from vlmrl.record.tokens import read_spellings
from vlmrl.rendering.renderer import Renderer
from vlmrl.runs.build import Run, is_float32
from vlmrl.runs.replay import lines
from vlmrl.runs.replay.lines import Line, Rendered, Resampled, Scored, Spelling, Verdict
from vlmrl.runs.replay.recorded import fits, load_images, load_records, replayed_batch, rollout_of
from vlmrl.runs.sft import take_supervised_steps
from vlmrl.runs.stopping import stopped_before
from vlmrl.trainer.checkpoint import Checkpoints
from vlmrl.types import EngineSession, InferenceEngine, Message, Rollout, SamplingParams, Trainer, TrainingSample, Turn

LINES = ("pictures", "tensors", "prompts", "completions", "logprobs, engine", "logprobs, trainer")
"""Names, in the order of the table."""

ROUNDING_EXACT = 1e-4
"""Nats of one token where everything computes in float32; measured between packings and engines: below 1e-5."""
ROUNDING = 0.5
"""The same where anything computes in a shorter format: bfloat16 makes 0.1 to 0.3 of a token that was unlikely."""


async def replay(run: Run) -> ExitReason:
    """Compare one recorded batch with what today's code makes of it. Raises `ParityError` where they differ by more
    than rounding, after the table is shown and written."""
    recorded, step = replayed_batch(run.config)
    checkpoints = Checkpoints(recorded.checkpoints, run.config.trainer.keep_checkpoints)
    if step - 1 in checkpoints.steps():
        checkpoints.load(step - 1, run.trainer)
        weights = f"the checkpoint of version {step - 1}"
    elif await take_supervised_steps(run):
        weights = f"version 0, made again: the model and {run.trainer.supervised_steps} supervised steps"
    else:
        return "interrupted"
    run.monitor.phase("replay")
    await run.weight_sync.publish(step - 1)
    then = parse(typed(recorded.read_config(key="run")))
    replaying = asyncio.create_task(
        Replay(
            recorded=recorded,
            step=step,
            config=run.config,
            renderer=run.renderer,
            engine=run.engine,
            trainer=run.trainer,
            exact=is_float32(run.config) and is_float32(then),
            same_engine=run.config.inference.kind == then.inference.kind,
            status=run.monitor.status,
        ).run()
    )
    if await stopped_before(replaying, run.stop):
        return "interrupted"
    found = replaying.result()
    run.run_dir.write_replay(content(recorded, step, found))
    run.monitor.table(f"replay of step {step}", {"weights": weights, **{line.name: line.text for line in found}})
    conclude(found)
    return "finished"


@dataclass(eq=False)
class Replay:
    """Replays one batch. The engine is up and serves the weights of version `step` − 1, which the trainer holds."""

    recorded: RunDir
    """The run."""
    step: int
    config: RunConfig
    """Today's."""
    renderer: Renderer
    engine: InferenceEngine
    trainer: Trainer
    exact: bool
    """Whether the run computed in float32, and today's code does."""
    same_engine: bool
    """Whether the engine is of the kind that the run had."""
    status: Callable[[str], None]
    """Gets a line about what is being done."""
    _rounding: float = field(init=False)

    def __post_init__(self) -> None:
        self._rounding = ROUNDING_EXACT if self.exact else ROUNDING

    async def run(self) -> list[Line]:
        """One line for each of `LINES`. Raises VlmrlError where the record cannot be read."""
        spelling: Spelling = read_spellings(self.recorded.tokens) if self.recorded.tokens.exists() else {}
        self.status("replay: pictures and prompts")
        records = await asyncio.to_thread(load_records, self.recorded, self.step)
        images = await asyncio.to_thread(load_images, self.recorded, records, self.renderer)
        rollouts = [rollout_of(record, images) for record in records]
        found = [lines.pictures(LINES[0], images, rollouts), lines.tensors(LINES[1], images, rollouts)]
        found.append(lines.prompts(LINES[2], await self._rendered(rollouts), spelling))
        if not all(fits(rollout) for rollout in rollouts):
            why = "an image takes another number of tokens than was recorded"
            return [*found, *(Line(name, Verdict.HIDDEN, why) for name in LINES[3:])]
        self.status("replay: completions")
        resampled = await self._resampled(rollouts)
        if not resampled:
            why = f"other policy versions than {self.step - 1} sampled the batch"
            found += [Line(name, Verdict.HIDDEN, why) for name in LINES[3:5]]
        elif self.same_engine:
            found.append(lines.completions(LINES[3], resampled, self.exact, spelling))
            same = [_same_tokens(each) for each in resampled]
            found.append(lines.logprobs(LINES[4], same, self._rounding, spelling))
        else:
            found.append(Line(LINES[3], Verdict.HIDDEN, "another engine draws other tokens from the same seeds"))
            sides = "by the trainer", f"by the engine, of {len(resampled)} completions of its own"
            both = await asyncio.to_thread(self._scored_again, resampled)
            found.append(lines.logprobs(LINES[4], both, self._rounding, spelling, sides=sides))
        self.status("replay: the trainer's logprobs")
        scored = await asyncio.to_thread(self._scored, rollouts)
        found.append(lines.logprobs(LINES[5], scored, self._rounding, spelling))
        return found

    async def _rendered(self, rollouts: Sequence[Rollout]) -> list[Rendered]:
        """Every prompt, rendered again from its messages and, in later turns, the recorded turn before it."""
        made = []
        for rollout in rollouts:
            history: list[Message] = []
            for number, turn in enumerate(rollout.turns):
                if number == 0:
                    prompt = await self.renderer.first_turn(turn.messages)
                else:
                    before = rollout.turns[number - 1]
                    history.append(Message.of("assistant", before.text))
                    prompt, _ = await self.renderer.next_turn(
                        before.prompt, before.completion.token_ids, history, turn.messages
                    )
                history.extend(turn.messages)
                made.append(Rendered(rollout, number, prompt))
        return made

    async def _resampled(self, rollouts: Sequence[Rollout]) -> list[Resampled]:
        """Every completion that the weights of this replay sampled, sampled again, in the order of the batch."""
        async with AsyncExitStack() as scope:
            seats = []
            for rollout in rollouts:  # all open before the first one asks: an engine may wait for all that are
                closing = await scope.enter_async_context(AsyncExitStack())
                session = await closing.enter_async_context(self.engine.session(rollout.rollout_id))
                seats.append((rollout, session, closing))
            played = await asyncio.gather(*(self._play(*seat) for seat in seats))
        return [each for turns in played for each in turns]

    async def _play(self, rollout: Rollout, session: EngineSession, closing: AsyncExitStack) -> list[Resampled]:
        orchestrator, played = self.config.orchestrator, []
        async with closing:
            for number, turn in enumerate(rollout.turns):
                if (turn.completion.versions != self.step - 1).any():
                    break
                sampling = SamplingParams(
                    max_new_tokens=min(
                        orchestrator.max_new_tokens, self.config.inference.max_model_len - len(turn.prompt.token_ids)
                    ),
                    temperature=orchestrator.temperature,
                    stop_token_ids=self.renderer.stop_token_ids,
                    banned_token_ids=self.renderer.banned_token_ids,
                    seed=sampling_seed(self.config.seed, rollout.rollout_id, number),
                )
                played.append(Resampled(rollout, number, await session.generate(turn.prompt, sampling)))
        return played

    def _scored(self, rollouts: Sequence[Rollout]) -> list[Scored]:
        """The turns that were learned from; the samples are those of the step, so they pack as they did."""
        learned = [rollout for rollout in rollouts if rollout.dropped is None]
        samples = [(rollout, sample) for rollout in learned for sample in make_samples(rollout)]
        branches = [
            list(branch) for rollout in learned for _, branch in groupby(_numbered(rollout), lambda n: n[1].branch)
        ]
        scored = []
        today = self.trainer.logprobs([sample for _, sample in samples])
        for (rollout, _), turns, found in zip(samples, branches, today, strict=True):
            ends = np.cumsum([len(turn.completion.token_ids) for _, turn in turns])
            for (number, turn), part in zip(turns, np.split(found, ends[:-1]), strict=True):
                recorded = turn.learned.trainer_logprobs if turn.learned is not None else turn.completion.logprobs
                scored.append(Scored(rollout, number, turn.completion.token_ids, recorded, part))
        return scored

    def _scored_again(self, resampled: Sequence[Resampled]) -> list[Scored]:
        """What the engine sampled today, by the trainer and by the engine."""
        samples = [_sample_of(each) for each in resampled]
        return [
            Scored(each.rollout, each.number, each.today.token_ids, by_trainer, each.today.logprobs)
            for each, by_trainer in zip(resampled, self.trainer.logprobs(samples), strict=True)
        ]


def _numbered(rollout: Rollout) -> list[tuple[int, Turn]]:
    return list(enumerate(rollout.turns))


def _same_tokens(each: Resampled) -> Scored:
    """The logprobs of a completion up to the first token that was sampled otherwise."""
    recorded = each.turn.completion
    end = lines.first_difference(recorded.token_ids, each.today.token_ids)
    ids = recorded.token_ids[:end]
    return Scored(each.rollout, each.number, ids, recorded.logprobs[:end], each.today.logprobs[:end])


def _sample_of(each: Resampled) -> TrainingSample:
    """A recorded prompt with the completion that the engine gives it today."""
    (sample,) = make_samples(
        Rollout(
            rollout_id=each.rollout.rollout_id,
            problem_id=each.rollout.problem_id,
            index=each.rollout.index,
            turns=[replace(each.turn, completion=each.today, branch=0, learned=None)],
            reward=0.0,
            metrics={},
            stop_reason=each.rollout.stop_reason,
        )
    )
    return sample


def content(recorded: RunDir, step: int, found: Sequence[Line]) -> dict[str, object]:
    """replay.json."""
    first = first_of(found)
    return {
        "run": str(recorded.path),
        "step": step,
        "policy_version": step - 1,
        "identical": all(line.verdict in (Verdict.SAME, Verdict.HIDDEN) for line in found),
        "first": first and asdict(first),
        "lines": [asdict(line) for line in found],
    }


def first_of(found: Sequence[Line]) -> Line | None:
    """The first line that differs, or else the first that rounds otherwise."""
    for verdict in (Verdict.DIFFERS, Verdict.ROUNDING):
        for line in found:
            if line.verdict is verdict:
                return line
    return None


def conclude(found: Sequence[Line]) -> None:
    """Raise `ParityError` with the first line that differs, unless all that differs is rounding."""
    first = first_of(found)
    if first is not None and first.verdict is Verdict.DIFFERS:
        raise ParityError(f"the batch is not what it was; {first.name}: {first.says}")
