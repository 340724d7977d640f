"""`mode=doctor`: a few problems through renderer, engine and trainer, and a table with a verdict per check.

    scripted answers ─▶ renderer                    token ids and pixels against transformers'
    publish 0 ─▶ rollouts ─▶ samples ─▶ trainer     placeholders, hashes, positions, logprobs
                 the same sequences in transformers' own forward, one by one
                 the same tokens, pixels inverted   does the trainer look at them, does the engine
    a step and noise ─▶ publish 1 ─▶ rollouts       did the policy change, did every weight arrive, logprobs again

Run it before a week of GPUs. All parts are the run's own (task, renderer, engine, trainer, weight sync); only the
lengths are shorter, and nothing is saved. The weights that the doctor changes are gone with the process. Servers of
`inference.urls` keep them until a run publishes its own weights, which every run does before its first request.

A check that has nothing to look at is `not visible`, which is no failure. A check that raises has failed, with the
traceback in logs/main.log; the checks after it still run where they can.

Left out on purpose: throughput and memory (the first steps of a run show them), demonstrations, several ranks.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import numpy as np
import torch

from vlmrl.config.model import Dtype
from vlmrl.config.orchestrator import TEMPLATE
from vlmrl.config.run import RunConfig
from vlmrl.config.task import most_turns
from vlmrl.models.checkpoints.load import load_image_processor, load_processor, load_tokenizer, resolve_checkpoint
from vlmrl.models.families import family_of
from vlmrl.orchestrator.interruption import stopped_before
from vlmrl.orchestrator.loop import ExitReason
from vlmrl.orchestrator.rollout import RolloutRunner, sampling_seed
from vlmrl.orchestrator.samples import make_samples
from vlmrl.orchestrator.stream import Drawn, ProblemStream
from vlmrl.rendering.renderer import Renderer, renderer_name
from vlmrl.runs.build import Run, compute_dtypes
from vlmrl.runs.doctor.certificate import certificate
from vlmrl.runs.doctor.evidence import Evidence, engine_logprobs, images_of, with_images
from vlmrl.runs.doctor.logprobs import FLOAT32_KL, ROUNDING_FACTOR, LogprobDifference, logprobs
from vlmrl.runs.doctor.noise_images import NoiseTask
from vlmrl.runs.doctor.own_forward import own_forward
from vlmrl.runs.doctor.pixels import InvertedPixels, images_in_engine, images_in_trainer, pixels
from vlmrl.runs.doctor.placeholders import image_hashes, placeholders
from vlmrl.runs.doctor.positions import engine_positions, trainer_positions
from vlmrl.runs.doctor.reference import ProcessorReference, Reference
from vlmrl.runs.doctor.rollouts import rollouts, versions
from vlmrl.runs.doctor.tokens import first_turns, later_turns
from vlmrl.runs.doctor.watching import ScriptedEngine, WatchedEngine, WatchedRenderer, watched_rows
from vlmrl.runs.doctor.weights import add_noise, update, weights, weights_in
from vlmrl.runs.verdicts import Verdict, as_table, conclude, failed, not_visible
from vlmrl.tasks.loading import tokenizer_texts
from vlmrl.trainer.trainer import LocalTrainer
from vlmrl.types import (
    FloatArray,
    Group,
    InferenceEngine,
    Message,
    Prompt,
    Rollout,
    SamplingParams,
    StepResult,
    StopReason,
    TrainingSample,
    Turn,
)

log = logging.getLogger(__name__)

CHECKS = (
    "token ids, first turns",
    "token ids, later turns",
    "pixels",
    "rollouts, version 0",
    "placeholders",
    "image hashes",
    "positions, trainer",
    "positions, engine",
    "logprobs, version 0",
    "logprobs, transformers",
    "images, trainer",
    "images, engine",
    "update",
    "weights",
    "rollouts, version 1",
    "logprobs, version 1",
    "versions",
)
"""Names of the checks, in the order of the table."""

CONSEQUENCE = "so a run would learn from something other than what it sampled, or not at all"

PROBLEMS = 6
"""Half of them are the run's first problems, the others the same with noise for images (noise_images.py)."""
SIBLINGS = 2
"""Sampled rollouts per problem; one more is greedy."""
MAX_TURNS = 3
MAX_NEW_TOKENS = 16
"""Per completion. A disagreement shows within a few tokens, or not at all."""

ANSWER = "A"
"""The answer to every turn where only the renderer is checked."""

FIRST_NOISE = 0.02
"""Standard deviation of the noise on the weights, relative to their root mean square. It is doubled until the logprobs
show it (`MARGIN`), at most `DOUBLINGS` times."""
DOUBLINGS = 6
MARGIN = 10.0
"""The change of the logprobs must be this many times the bound on the mismatch, so that the bound can tell the new
weights from the old."""


async def examine(run: Run) -> ExitReason:
    """Check that the parts of the run agree. Raises `ParityError` where they do not, after the table is shown and
    written."""
    run.monitor.phase("doctor")
    doctor = Doctor(run)
    examination = asyncio.create_task(doctor.examine())
    if await stopped_before(examination, run.stop):
        return "interrupted"
    verdicts = examination.result()
    for version, groups in doctor.groups.items():
        run.monitor.record(version, groups)
    run.run_dir.write_doctor(certificate(run.config, doctor.folder, run.policy, verdicts))
    run.monitor.table("doctor", as_table(verdicts))
    conclude(verdicts, CONSEQUENCE)
    return "finished"


class Doctor:
    """Examines the parts of a run. The engine must be started, and nothing published yet."""

    def __init__(self, run: Run) -> None:
        config = run.config
        assert config.orchestrator.renderer is not None, "preflight refuses a config without a renderer"
        self._run = run
        self.groups: dict[int, list[Group]] = {}
        """Policy version → its rollouts, for the record."""
        self.folder = resolve_checkpoint(config.model, tokenizer_texts(config.model, run.task))
        """Of the checkpoint."""
        self._reference = _reference(config, self.folder)
        # A trainer of the same weights at temperature 0, whose logprobs are those of greedy decoding.
        self._greedy_trainer = LocalTrainer(
            run.policy, config.trainer, config.algorithm, temperature=0.0, max_new_tokens=MAX_NEW_TOKENS
        )

    async def examine(self) -> list[Verdict]:
        """One verdict for each of `CHECKS`."""
        verdicts: list[Verdict] = []

        async def judge(check: Callable[..., Verdict], *evidence: object) -> None:
            """Add the verdict of the next check."""
            name = CHECKS[len(verdicts)]
            try:
                verdict = await asyncio.to_thread(check, name, *evidence)
            except Exception as error:  # the other checks are still useful
                log.exception("%s", name)
                verdict = failed(name, _in_one_line(error))
            verdicts.append(verdict)

        why = "not reached: there is no rollout to look at"
        try:
            await self._examine(judge)
        except Exception as error:  # any part of the run may fail, and finding that is the doctor's purpose
            name = CHECKS[len(verdicts)]
            log.exception("%s", name)
            verdicts.append(failed(name, _in_one_line(error)))
            why = f"not reached after {name!r}"
        return verdicts + [not_visible(name, why) for name in CHECKS[len(verdicts) :]]

    async def _examine(self, judge: Callable[..., Awaitable[None]]) -> None:
        """Judge every check, in the order of `CHECKS`."""
        run, image_token_id = self._run, self._reference.image_token_id
        run.monitor.status("doctor: prompts and pixels against transformers")
        scripted = await self._scripted()
        await judge(first_turns, self._reference, scripted)
        await judge(later_turns, self._reference, scripted)
        await judge(pixels, self._reference, scripted)

        run.monitor.status("doctor: rollouts of version 0")
        await run.weight_sync.publish(0)
        before = await self._play(0)
        await judge(rollouts, before)
        if not before.samples:
            return
        await judge(placeholders, run.policy, image_token_id, before.samples)
        await judge(image_hashes, before, await self._shown_twice(before))
        await judge(trainer_positions, run.policy, image_token_id, before.samples)
        await judge(engine_positions, run.policy, before)
        bound = await asyncio.to_thread(self._bound, before)
        await judge(logprobs, await asyncio.to_thread(self._difference, before), bound)
        trained = await asyncio.to_thread(self._greedy_trainer.logprobs, before.samples)
        await judge(own_forward, run.policy, before.samples, trained, bound)

        run.monitor.status("doctor: other pixels behind the same tokens")
        inverted = await self._inverted(before)
        await judge(images_in_trainer, inverted, max(FLOAT32_KL, bound / ROUNDING_FACTOR))
        await judge(images_in_engine, inverted, bound)

        run.monitor.status("doctor: an optimizer step, other weights, rollouts of version 1")
        await judge(update, *await asyncio.to_thread(self._change_weights, before, MARGIN * bound))
        await run.weight_sync.publish(1)
        await judge(weights, await run.weight_sync.compare())
        after = await self._play(1)
        await judge(rollouts, after)
        if not after.samples:
            return
        await judge(logprobs, await asyncio.to_thread(self._difference, after), bound)
        await judge(versions, [before, after])

    # ── rollouts ────────────────────────────────────────────────────────────────────────────────────────────

    async def _scripted(self) -> list[Rollout]:
        """One rollout per problem in which every turn is answered with `ANSWER`."""
        renderer = self._run.renderer
        token_ids = self._reference.tokenizer.encode(ANSWER, add_special_tokens=False)
        engine = ScriptedEngine(np.array([*token_ids, renderer.stop_token_ids[0]], np.int64))
        groups = await self._runner(renderer, engine).run_groups(
            split="train", step=0, problems=await self._problems(), group_size=1, temperature=0.0
        )
        return [rollout for group in groups for rollout in group.rollouts]

    async def _play(self, version: int) -> Evidence:
        """The run's first problems, sampled and greedy, played by the policy of `version`."""
        renderer, engine = WatchedRenderer(self._run.renderer), WatchedEngine(self._run.engine)
        runner = self._runner(renderer, engine)
        groups: list[Group] = []
        with watched_rows(self._run.policy) as rows:
            for size, temperature in ((SIBLINGS, self._run.config.orchestrator.temperature), (1, 0.0)):
                groups += await runner.run_groups(
                    split="train",
                    step=version,
                    problems=await self._problems(),
                    group_size=size,
                    temperature=temperature,
                )
        self.groups[version] = groups
        return Evidence(groups, renderer.rendered, engine.requests, rows.distinct())

    async def _problems(self) -> list[Drawn]:
        """The task's first problems, each as it is and in noise."""
        return await ProblemStream(NoiseTask(self._run.task), "train").draw(0, PROBLEMS)

    def _runner(self, renderer: Renderer, engine: InferenceEngine) -> RolloutRunner:
        config = self._run.config
        return RolloutRunner(
            task=NoiseTask(self._run.task),
            renderer=renderer,
            engine=engine,
            seed=config.seed,
            max_turns=min(most_turns(config.task), MAX_TURNS),
            max_new_tokens=min(config.orchestrator.max_new_tokens, MAX_NEW_TOKENS),
            max_model_len=config.inference.max_model_len,
        )

    # ── logprobs ────────────────────────────────────────────────────────────────────────────────────────────

    def _trainer_logprobs(self, sampled: Sequence[TrainingSample], greedy: Sequence[TrainingSample]) -> FloatArray:
        """float32 [loss tokens of both]: the trainer's logprobs."""
        found = [*self._run.trainer.logprobs(sampled), *self._greedy_trainer.logprobs(greedy)]
        return np.concatenate([np.empty(0, np.float32), *found])

    def _difference(self, evidence: Evidence) -> LogprobDifference:
        """The trainer's logprobs against the engine's."""
        trainer = self._trainer_logprobs(evidence.sampled, evidence.greedy)
        return LogprobDifference.between(trainer, engine_logprobs(evidence.samples))

    def _bound(self, evidence: Evidence) -> float:
        """The largest mean mismatch_kl between engine and trainer that rounding explains.

        Where either computes in bfloat16, it follows from the trainer's own rounding on the same tokens. It is measured
        before the optimizer has a state, which takes as much memory as the second copy of the weights does here, and
        used for both versions.
        """
        if Dtype.bfloat16 not in compute_dtypes(self._run.config):
            return FLOAT32_KL
        is_bfloat16 = self._run.config.model.dtype is Dtype.bfloat16
        as_it_is = self._trainer_logprobs(evidence.sampled, evidence.greedy)
        with weights_in(self._run.policy, torch.float32 if is_bfloat16 else torch.bfloat16):
            other = self._trainer_logprobs(evidence.sampled, evidence.greedy)
        return max(FLOAT32_KL, ROUNDING_FACTOR * LogprobDifference.between(as_it_is, other).kl)

    def _change_weights(
        self, evidence: Evidence, smallest: float
    ) -> tuple[StepResult, float, LogprobDifference, float]:
        """Take a real optimizer step, then add noise to every trainable weight: a step may be too small to show in
        bfloat16. Returns the arguments of the check `update`."""
        samples = [
            dataclasses.replace(sample, advantages=sample.loss_mask.astype(np.float32)) for sample in evidence.sampled
        ]
        step = self._run.trainer.train_step(samples)
        noise = 0.0
        for doubling in range(DOUBLINGS):
            noise = FIRST_NOISE * 2**doubling
            add_noise(self._run.policy, noise, seed=doubling)
            logprobs_now = self._trainer_logprobs(evidence.sampled, ())
            change = LogprobDifference.between(logprobs_now, engine_logprobs(evidence.sampled))
            if change.kl > smallest:
                break
        return step, noise, change, smallest

    # ── images ──────────────────────────────────────────────────────────────────────────────────────────────

    async def _shown_twice(self, evidence: Evidence) -> Prompt | None:
        """A first prompt in which one image stands at two places; None where no first turn shows an image."""
        openings = evidence.openings()
        return await self._run.renderer.first_turn(_first_image_twice(openings[0])) if openings else None

    async def _inverted(self, evidence: Evidence) -> InvertedPixels | None:
        """Logprobs of first turns with their pixels and with these inverted; None without images.

        The tokens are equal, the images are not. The engine answers both kinds. Where a turn has several images, the
        first of them is shown twice.
        """
        shown: list[Prompt] = []
        for opening in evidence.openings():
            messages = _first_image_twice(opening) if len(images_of(opening)) > 1 else opening
            inverted = with_images(messages, [255 - part.source for part in images_of(messages)])
            shown += [
                await self._run.renderer.first_turn(messages),
                await self._run.renderer.first_turn(inverted),
            ]
        if not shown:
            return None
        samples = await self._answered(shown)
        others = [shown[i ^ 1] for i in range(len(shown))]  # each prompt's inverse is its neighbour
        swapped = [
            dataclasses.replace(sample, placeholders=prompt.placeholders, images=prompt.images)
            for sample, prompt in zip(samples, others, strict=True)
        ]
        trainer = await asyncio.to_thread(self._trainer_logprobs, samples, ())
        trainer_swapped = await asyncio.to_thread(self._trainer_logprobs, swapped, ())
        engine = engine_logprobs(samples)
        return InvertedPixels(
            trainer_change=LogprobDifference.between(trainer, trainer_swapped),
            shown=LogprobDifference.between(trainer, engine),
            inverted=LogprobDifference.between(trainer_swapped, engine),
        )

    async def _answered(self, prompts: Sequence[Prompt]) -> list[TrainingSample]:
        """A training sample for each prompt with one completion that the engine samples."""
        config, renderer = self._run.config, self._run.renderer
        limit = min(config.orchestrator.max_new_tokens, MAX_NEW_TOKENS)
        async with AsyncExitStack() as stack:
            names = [f"doctor/images/{i:02d}" for i in range(len(prompts))]
            # All sessions are open before the first request: an engine may wait for every open session to ask.
            sessions = [await stack.enter_async_context(self._run.engine.session(name)) for name in names]
            completions = await asyncio.gather(
                *(
                    session.generate(
                        prompt,
                        SamplingParams(
                            max_new_tokens=min(limit, config.inference.max_model_len - len(prompt.token_ids)),
                            temperature=config.orchestrator.temperature,
                            stop_token_ids=renderer.stop_token_ids,
                            banned_token_ids=renderer.banned_token_ids,
                            seed=sampling_seed(config.seed, name, 0),
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


def _reference(config: RunConfig, folder: Path) -> Reference:
    """What the run's prompts are compared with: the files in `folder`, loaded again."""
    model, settings = config.model, config.orchestrator.renderer
    assert settings is not None, "preflight refuses a config without a renderer"
    token, parse = family_of(model.vlm).image_token, settings.parse_control_tokens
    if model.vlm is not None and renderer_name(settings, model) == TEMPLATE:
        processor = load_processor(folder, model.vlm)
        return ProcessorReference(
            processor.tokenizer, processor.image_processor, token, parse, processor, settings.options
        )
    return Reference(
        load_tokenizer(folder), load_image_processor(folder, model.vlm) if model.vlm is not None else None, token, parse
    )


def _in_one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _first_image_twice(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The messages with their first image also in place of the second, or behind the first where there is only one."""
    sources = [part.source for part in images_of(messages)]
    if len(sources) > 1:
        return with_images(messages, [sources[0], sources[0], *sources[2:]])
    return tuple(dataclasses.replace(m, content=(*m.content, *images_of([m]))) for m in messages)
