"""`mode=doctor`: a few problems through renderer, engine and trainer, and a table with a verdict per line.

    scripted answers ─▶ renderer                    token ids, pixels        against transformers' own
    publish 0 ─▶ rollouts ─▶ samples ─▶ trainer     placeholders, hashes, positions, logprobs
                 the same tokens, pixels inverted   does the trainer see them, does the engine
    a step and noise ─▶ publish 1 ─▶ rollouts       is it another policy, did every weight arrive, logprobs again

What a user runs before a week of GPUs: everything is the run's own (task, renderer, engine, trainer, weight sync) but
the lengths, and nothing is kept. The weights that the doctor moves are gone with the process; servers of
`inference.urls` keep them until a run publishes its own, which every run does before it asks anything.

A line that cannot be looked at says so (`not visible`) and does not fail. Whatever a line raises is its failure, with
the traceback in logs/main.log, and what is after it is looked at all the same where it can be.

Left out on purpose: throughput and memory (the first steps of a run show them), demonstrations, several ranks.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager

import numpy as np
import torch

from vlmrl.config.model import Dtype
from vlmrl.errors import ParityError
from vlmrl.models.checkpoints.load import load_image_processor, load_tokenizer, resolve_checkpoint
from vlmrl.models.policy import Policy
from vlmrl.orchestrator.loop import ExitReason
from vlmrl.orchestrator.rollout import RolloutRunner, sampling_seed
from vlmrl.orchestrator.samples import make_samples
from vlmrl.rendering.renderer import Renderer
from vlmrl.runs.build import Run, compute_dtypes
from vlmrl.runs.doctor import lines as checks
from vlmrl.runs.doctor.evidence import (
    Played,
    ScriptedEngine,
    WatchedEngine,
    WatchedRenderer,
    engine_logprobs,
    images_of,
    watched_rows,
    with_images,
)
from vlmrl.runs.doctor.lines import Agreement, Line, OtherPixels, Reference, Verdict
from vlmrl.runs.doctor.pictures import PicturedTask
from vlmrl.runs.stopping import stopped_before
from vlmrl.trainer.trainer import LocalTrainer
from vlmrl.types import (
    FloatArray,
    Group,
    InferenceEngine,
    Message,
    Prompt,
    Rollout,
    SamplingParams,
    StopReason,
    TrainingSample,
    Turn,
)

log = logging.getLogger(__name__)

LINES = (
    "token ids, first turns",
    "token ids, later turns",
    "pixels",
    "rollouts, version 0",
    "placeholders",
    "image hashes",
    "positions, trainer",
    "positions, engine",
    "logprobs, version 0",
    "images, trainer",
    "images, engine",
    "update",
    "weights",
    "rollouts, version 1",
    "logprobs, version 1",
    "versions",
)
"""Names, in the order of the table."""

PROBLEMS = 6
"""Half of them are the run's first, the others the same in noise (pictures.py)."""
SIBLINGS = 2
"""Sampled rollouts per problem; one more is greedy."""
MAX_TURNS = 3
MAX_NEW_TOKENS = 16
"""Per completion: parity shows in a few tokens, or not at all."""

ANSWER = "A"
"""What every turn answers where the renderer alone is looked at."""

NOISE = 0.02
"""Of the weights' root mean square, doubled until the logprobs show it (`POWER`), at most `DOUBLINGS` times."""
DOUBLINGS = 6
POWER = 10.0
"""Times the bound on the mismatch that a change must be, for the bound to tell it from none."""


async def examine(run: Run) -> ExitReason:
    """Check that the parts of the run agree. Raises `ParityError` where they do not, after the table is shown and
    written."""
    run.monitor.phase("doctor")
    doctor = Doctor(run)
    examination = asyncio.create_task(doctor.examine())
    if await stopped_before(examination, run.stop):
        return "interrupted"
    lines = examination.result()
    for version, groups in doctor.groups.items():
        run.monitor.record(version, groups)
    run.run_dir.write_doctor([dataclasses.asdict(line) for line in lines])
    run.monitor.table("doctor", {line.name: line.text for line in lines})
    conclude(lines)
    return "finished"


class Doctor:
    """Examines the parts of a run. The engine is up, and nothing was published yet."""

    def __init__(self, run: Run) -> None:
        config, vlm = run.config, run.config.model.vlm
        self.run = run
        self.config = config
        self.task, self.renderer, self.policy = run.task, run.renderer, run.policy
        self.engine, self.trainer, self.weight_sync = run.engine, run.trainer, run.weight_sync
        self.status = run.monitor.status
        self.groups: dict[int, list[Group]] = {}
        """Policy version → its rollouts, for the record."""
        folder = resolve_checkpoint(config.model, self.task.texts())
        self._reference = Reference(
            load_tokenizer(folder),
            load_image_processor(folder) if vlm is not None else None,
            vlm.image_token if vlm is not None else None,
        )
        self._image_token_id: int | None = None
        if vlm is not None:
            self._image_token_id = self._reference.tokenizer.convert_tokens_to_ids(vlm.image_token)
        # The same weights, reading the distribution that greedy decoding reads.
        self._greedy_trainer = LocalTrainer(
            self.policy, config.trainer, config.algorithm, temperature=0.0, max_new_tokens=MAX_NEW_TOKENS
        )

    async def examine(self) -> list[Line]:
        """One line for each of `LINES`."""
        lines: list[Line] = []

        async def look(check: Callable[..., Line], *evidence: object) -> None:
            """Add the next line."""
            name = LINES[len(lines)]
            try:
                line = await asyncio.to_thread(check, name, *evidence)
            except Exception as error:  # the other lines are still of use
                log.exception("%s", name)
                line = checks.failed(name, _said(error))
            lines.append(line)

        why = "not reached: there is no rollout to look at"
        try:
            await self._examine(look)
        except Exception as error:  # whatever stands in the way is what the doctor is there to find
            stuck = LINES[len(lines)]
            log.exception("%s", stuck)
            lines.append(checks.failed(stuck, _said(error)))
            why = f"not reached after {stuck!r}"
        return lines + [checks.hidden(name, why) for name in LINES[len(lines) :]]

    async def _examine(self, look: Callable[..., Awaitable[None]]) -> None:
        """From the task to the second policy version; in the order of `LINES`."""
        self.status("doctor: prompts and pixels against transformers")
        scripted = await self._scripted()
        await look(checks.first_turns, self._reference, scripted)
        await look(checks.later_turns, self._reference, scripted)
        await look(checks.pixels, self._reference, scripted)

        self.status("doctor: rollouts of version 0")
        await self.weight_sync.publish(0)
        before = await self._play(0)
        await look(checks.rollouts, before)
        if not before.samples:
            return
        await look(checks.placeholders, self.policy, self._image_token_id, before.samples)
        await look(checks.image_hashes, before, await self._shown_twice(before))
        await look(checks.trainer_positions, self.policy, self._image_token_id, before.samples)
        await look(checks.engine_positions, self.policy, before)
        bound = await asyncio.to_thread(self._bound, before)
        await look(checks.logprobs, await asyncio.to_thread(self._agreement, before), bound)

        self.status("doctor: other pixels behind the same tokens")
        pixels = await self._inverted(before)
        await look(checks.images_in_trainer, pixels, max(checks.EXACT_KL, bound / checks.ROUNDING))
        await look(checks.images_in_engine, pixels, bound)

        self.status("doctor: an optimizer step, other weights, rollouts of version 1")
        await look(checks.update, *await asyncio.to_thread(self._update, before, POWER * bound))
        await self.weight_sync.publish(1)
        await look(checks.weights, await self.weight_sync.compare())
        after = await self._play(1)
        await look(checks.rollouts, after)
        if not after.samples:
            return
        await look(checks.logprobs, await asyncio.to_thread(self._agreement, after), bound)
        await look(checks.versions, [before, after])

    # ── rollouts ────────────────────────────────────────────────────────────────────────────────────────────

    async def _scripted(self) -> list[Rollout]:
        """One episode per problem in which every turn is answered with `ANSWER`."""
        token_ids = self._reference.tokenizer.encode(ANSWER, add_special_tokens=False)
        engine = ScriptedEngine(np.array([*token_ids, self.renderer.stop_token_ids[0]], np.int64))
        runner = self._runner(self.renderer, engine)
        groups = await runner.run_groups(
            split="train", step=0, problem_indices=range(PROBLEMS), group_size=1, temperature=0.0
        )
        return [rollout for group in groups for rollout in group.rollouts]

    async def _play(self, version: int) -> Played:
        """The run's first problems, sampled and greedy, by the policy of `version`."""
        renderer, engine = WatchedRenderer(self.renderer), WatchedEngine(self.engine)
        runner = self._runner(renderer, engine)
        groups: list[Group] = []
        with watched_rows(self.policy) as rows:
            for size, temperature in ((SIBLINGS, self.config.orchestrator.temperature), (1, 0.0)):
                groups += await runner.run_groups(
                    split="train",
                    step=version,
                    problem_indices=range(PROBLEMS),
                    group_size=size,
                    temperature=temperature,
                )
        self.groups[version] = groups
        return Played(groups, renderer.rendered, engine.requests, rows.all())

    def _runner(self, renderer: Renderer, engine: InferenceEngine) -> RolloutRunner:
        config = self.config
        return RolloutRunner(
            task=PicturedTask(self.task),
            renderer=renderer,
            engine=engine,
            seed=config.seed,
            max_turns=min(config.task.max_turns, MAX_TURNS),
            max_new_tokens=min(config.orchestrator.max_new_tokens, MAX_NEW_TOKENS),
            max_model_len=config.inference.max_model_len,
        )

    # ── logprobs ────────────────────────────────────────────────────────────────────────────────────────────

    def _trainer_logprobs(self, sampled: Sequence[TrainingSample], greedy: Sequence[TrainingSample]) -> FloatArray:
        """float32 [loss tokens of both]."""
        found = [*self.trainer.logprobs(sampled), *self._greedy_trainer.logprobs(greedy)]
        return np.concatenate([np.empty(0, np.float32), *found])

    def _agreement(self, played: Played) -> Agreement:
        """Trainer against engine."""
        return Agreement.of(self._trainer_logprobs(played.sampled, played.greedy), engine_logprobs(played.samples))

    def _bound(self, played: Played) -> float:
        """Largest mean mismatch_kl between engine and trainer that is rounding.

        Where either computes in bfloat16: by the trainer's own rounding on the same tokens. Measured before the
        optimizer has a state, which takes as much memory as the second weights do here, and taken for both versions.
        """
        if Dtype.bfloat16 not in compute_dtypes(self.config):
            return checks.EXACT_KL
        as_it_is = self._trainer_logprobs(played.sampled, played.greedy)
        with weights_in(self.policy, torch.float32 if self.config.model.dtype is Dtype.bfloat16 else torch.bfloat16):
            other = self._trainer_logprobs(played.sampled, played.greedy)
        return max(checks.EXACT_KL, checks.ROUNDING * Agreement.of(as_it_is, other).kl)

    def _update(self, played: Played, smallest: float) -> tuple[object, ...]:
        """A real step, then noise on every weight that learns: a step may be too small for bfloat16 to show.
        → what `checks.update` takes."""
        samples = [
            dataclasses.replace(sample, advantages=sample.loss_mask.astype(np.float32)) for sample in played.sampled
        ]
        step = self.trainer.train_step(samples)
        noise = 0.0
        for doubling in range(DOUBLINGS):
            noise = NOISE * 2**doubling
            add_noise(self.policy, noise, seed=doubling)
            changed = Agreement.of(self._trainer_logprobs(played.sampled, ()), engine_logprobs(played.sampled))
            if changed.kl > smallest:
                break
        return step, noise, changed, smallest

    # ── images ──────────────────────────────────────────────────────────────────────────────────────────────

    async def _shown_twice(self, played: Played) -> Prompt | None:
        """A first prompt in which an image stands at two places; None where no first turn shows one."""
        opening = played.openings()
        return await self.renderer.first_turn(_repeated(opening[0])) if opening else None

    async def _inverted(self, played: Played) -> OtherPixels | None:
        """First turns with their pixels and with these inverted: equal tokens, other images. The engine answers both.
        Where a turn has several images, the first of them is shown twice. None without images."""
        right: list[Prompt] = []
        for opening in played.openings():
            messages = _repeated(opening) if len(images_of(opening)) > 1 else opening
            inverted = with_images(messages, [255 - part.source for part in images_of(messages)])
            right += [await self.renderer.first_turn(messages), await self.renderer.first_turn(inverted)]
        if not right:
            return None
        other = [right[i ^ 1] for i in range(len(right))]
        samples = await self._answered(right)
        swapped = [
            dataclasses.replace(sample, placeholders=prompt.placeholders, images=prompt.images)
            for sample, prompt in zip(samples, other, strict=True)
        ]
        ours = await asyncio.to_thread(self._trainer_logprobs, samples, ())
        ours_swapped = await asyncio.to_thread(self._trainer_logprobs, swapped, ())
        theirs = engine_logprobs(samples)
        return OtherPixels(
            moved=Agreement.of(ours, ours_swapped),
            right=Agreement.of(ours, theirs),
            wrong=Agreement.of(ours_swapped, theirs),
        )

    async def _answered(self, prompts: Sequence[Prompt]) -> list[TrainingSample]:
        """One sampled completion of the engine for each prompt."""
        limit = min(self.config.orchestrator.max_new_tokens, MAX_NEW_TOKENS)
        async with AsyncExitStack() as stack:
            names = [f"doctor/images/{i:02d}" for i in range(len(prompts))]
            # All are open before the first one asks: an engine may wait for all that are.
            sessions = [await stack.enter_async_context(self.engine.session(name)) for name in names]
            completions = await asyncio.gather(
                *(
                    session.generate(
                        prompt,
                        SamplingParams(
                            max_new_tokens=min(limit, self.config.inference.max_model_len - len(prompt.token_ids)),
                            temperature=self.config.orchestrator.temperature,
                            stop_token_ids=self.renderer.stop_token_ids,
                            banned_token_ids=self.renderer.banned_token_ids,
                            seed=sampling_seed(self.config.seed, name, 0),
                        ),
                    )
                    for session, prompt, name in zip(sessions, prompts, names, strict=True)
                )
            )
        samples: list[TrainingSample] = []
        for name, prompt, completion in zip(names, prompts, completions, strict=True):
            turn = Turn(prompt, completion, text="", messages=[], branch=0, reward=0.0)
            samples += make_samples(Rollout(name, name, 0, [turn], 0.0, {}, StopReason.TERMINATED))
        return samples


def conclude(lines: Sequence[Line]) -> None:
    """Raise `ParityError` where a line has failed."""
    failed = [line for line in lines if line.verdict is Verdict.FAILED]
    if failed:
        listed = "\n".join(
            f"  {line.name}: {line.says}" + (f" ({line.bound})" if line.bound else "") for line in failed
        )
        raise ParityError(
            f"{len(failed)} of {len(lines)} lines failed, so a run would learn from something else than it sampled, "
            f"or not at all:\n{listed}"
        )


def _said(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _repeated(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The messages with their first image in place of the second as well, or behind it where there is no second."""
    sources = [part.source for part in images_of(messages)]
    if len(sources) > 1:
        return with_images(messages, [sources[0], sources[0], *sources[2:]])
    return tuple(dataclasses.replace(m, content=(*m.content, *images_of([m]))) for m in messages)


# ── weights ─────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def weights_in(policy: Policy, dtype: torch.dtype) -> Iterator[None]:
    """The policy computes in `dtype` meanwhile. Its weights are then what they were, to the bit; both are in memory."""
    parameters = list(policy.model.parameters())
    kept, kept_dtype = [parameter.data for parameter in parameters], policy.dtype
    try:
        policy.dtype = dtype
        for parameter in parameters:
            parameter.data = parameter.data.to(dtype)
        yield
    finally:
        policy.dtype = kept_dtype
        for parameter, data in zip(parameters, kept, strict=True):
            parameter.data = data


def add_noise(policy: Policy, relative: float, seed: int) -> None:
    """Gaussian, on every weight that learns, of `relative` times its tensor's root mean square; a tensor of zeros moves
    as if that were 1e-3."""
    for number, parameter in enumerate(policy.model.parameters()):
        if parameter.requires_grad:
            generator = torch.Generator(parameter.device).manual_seed(1000 * seed + number)
            size = parameter.detach().float().square().mean().sqrt().clamp_min(1e-3)
            noise = torch.randn(parameter.shape, generator=generator, device=parameter.device)
            parameter.data.add_((relative * size * noise).to(parameter.dtype))
