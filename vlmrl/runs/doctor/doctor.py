"""`mode=doctor`: a few problems through renderer, engine and trainer, and a table with a verdict per check.

    scripted answers ─▶ renderer                    token ids and pixels against transformers'
    publish 0 ─▶ rollouts ─▶ samples ─▶ trainer     placeholders, hashes, positions, logprobs
                 the same sequences in transformers' own forward, one by one
                 the same samples one by one        logprobs and gradients without a prefix tree
                 the same tokens, pixels inverted   do the trainer, its gradient and the engine look at them
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
from collections.abc import Awaitable, Callable

import numpy as np

from vlmrl.config.trainer import Packing
from vlmrl.models.checkpoints.load import resolve_checkpoint
from vlmrl.orchestrator.interruption import stopped_before
from vlmrl.orchestrator.loop import ExitReason
from vlmrl.preflight.rules.past_run import older_certificate
from vlmrl.runs.build import Run
from vlmrl.runs.doctor.certificate import certificate
from vlmrl.runs.doctor.changes import changes
from vlmrl.runs.doctor.comparing import Comparing, inverted_samples
from vlmrl.runs.doctor.evidence import Evidence, engine_logprobs
from vlmrl.runs.doctor.gradients import images_in_gradient, packed_gradient
from vlmrl.runs.doctor.judging import raised, verdict_of
from vlmrl.runs.doctor.logprobs import FLOAT32, ROUNDING_FACTOR, Bound, LogprobDifference, logprobs
from vlmrl.runs.doctor.own_forward import own_forward
from vlmrl.runs.doctor.pixels import images_in_engine, images_in_trainer, pixels
from vlmrl.runs.doctor.placeholders import image_hashes, placeholders
from vlmrl.runs.doctor.playing import Playing
from vlmrl.runs.doctor.positions import engine_positions, trainer_positions
from vlmrl.runs.doctor.reference import reference_of
from vlmrl.runs.doctor.rollouts import rollouts, versions
from vlmrl.runs.doctor.tokens import first_turns, later_turns
from vlmrl.runs.doctor.weights import change_weights, update, weights
from vlmrl.runs.tools import example_completion, make_toolbox, texts_of_run
from vlmrl.runs.verdicts import Verdict, as_table, conclude, not_visible
from vlmrl.types import Group, IntArray, StepResult

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
    "logprobs, one by one",
    "gradient, one by one",
    "images, trainer",
    "images, gradient",
    "images, engine",
    "update",
    "weights",
    "rollouts, version 1",
    "logprobs, version 1",
    "versions",
)
"""Names of the checks, in the order of the table."""

CONSEQUENCE = "so a run would learn from something other than what it sampled, or not at all"

ANSWER = "A"
"""The answer to every turn where only the renderer is checked."""

MARGIN = 10.0
"""The change of the logprobs must be this many times the bound on the mismatch, so that the bound can tell the new
weights from the old."""

GRADIENT_PROBLEMS = 2
"""Problems whose samples the gradient is computed of: one with the task's images, one with noise."""
GRADIENT_PROMPTS = 4
"""Prompts of which the gradient is computed with their pixels and with inverted ones."""


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
    content = certificate(run.config, doctor.folder, run.policy, verdicts)
    run.monitor.table("doctor", as_table(verdicts))
    if (against := run.config.against) is not None:
        found = changes(older_certificate(against), content)
        content["against"] = {"path": against, "changes": [change.as_json() for change in found]}
        nothing = {"nothing": "versions, files, settings, verdicts and numbers are what they were, up to rounding"}
        run.monitor.table(f"changed since {against}", {change.title: change.line for change in found} or nothing)
    run.run_dir.write_doctor(content)
    conclude(verdicts, CONSEQUENCE)
    return "finished"


class Doctor:
    """Examines the parts of a run. The engine must be started, and nothing published yet."""

    def __init__(self, run: Run) -> None:
        config = run.config
        self._run = run
        self.groups: dict[int, list[Group]] = {}
        """Policy version → its rollouts, for the record."""
        self.folder = resolve_checkpoint(config.model, texts_of_run(config, run.task))
        """Of the checkpoint."""
        self._reference = reference_of(config, self.folder)
        self._tools = make_toolbox(config)
        self._playing = Playing(config, run.task, run.renderer, tools=self._tools)
        self._comparing = Comparing(config, run.policy, run.trainer)

    async def examine(self) -> list[Verdict]:
        """One verdict for each of `CHECKS`."""
        verdicts: list[Verdict] = []

        async def judge(check: Callable[..., Verdict], *evidence: object) -> None:
            """Add the verdict of the next check."""
            name = CHECKS[len(verdicts)]
            verdicts.append(await asyncio.to_thread(verdict_of, name, check, *evidence))

        why = "not reached: there is no rollout to look at"
        try:
            await self._examine(judge)
        except Exception as error:  # any part of the run may fail, and finding that is the doctor's purpose
            name = CHECKS[len(verdicts)]
            log.exception("%s", name)
            verdicts.append(raised(name, error))
            why = f"not reached after {name!r}"
        return verdicts + [not_visible(name, why) for name in CHECKS[len(verdicts) :]]

    def _scripted_answer(self) -> IntArray:
        """The answer to every turn where only the renderer is checked. With tools it calls one, so that later turns
        show its results."""
        if self._tools is not None:
            return example_completion(self._run.renderer, self._tools)
        return np.array(self._reference.tokenizer.encode(ANSWER, add_special_tokens=False), np.int64)

    async def _examine(self, judge: Callable[..., Awaitable[None]]) -> None:
        """Judge every check, in the order of `CHECKS`."""
        run, feature_ids = self._run, self._reference.feature_ids
        run.monitor.status("doctor: prompts and pixels against transformers")
        scripted = await self._playing.scripted(self._scripted_answer())
        await judge(first_turns, self._reference, scripted)
        await judge(later_turns, self._reference, scripted)
        await judge(pixels, self._reference, scripted)

        run.monitor.status("doctor: rollouts of version 0")
        await run.weight_sync.publish(0)
        before = await self._play(0)
        await judge(rollouts, before)
        if not before.samples:
            return
        await judge(placeholders, run.policy, feature_ids, before.samples)
        await judge(image_hashes, before, await self._playing.shown_twice(before))
        await judge(trainer_positions, run.policy, feature_ids, before.samples)
        await judge(engine_positions, run.policy, before)
        bound = await asyncio.to_thread(self._comparing.bound, before.sampled, before.greedy)
        await judge(logprobs, await asyncio.to_thread(self._comparing.with_engine, before), bound)
        await self._examine_trainer(judge, before, bound)

        run.monitor.status("doctor: an optimizer step, other weights, rollouts of version 1")
        await judge(update, *await asyncio.to_thread(self._change_weights, before, MARGIN * bound.kl))
        await run.weight_sync.publish(1)
        await judge(weights, await run.weight_sync.compare())
        after = await self._play(1)
        await judge(rollouts, after)
        if not after.samples:
            return
        await judge(logprobs, await asyncio.to_thread(self._comparing.with_engine, after), bound)
        await judge(versions, [before, after])

    async def _examine_trainer(self, judge: Callable[..., Awaitable[None]], before: Evidence, bound: Bound) -> None:
        """The samples in other computations than the trainer's packed one, and with other pixels."""
        run, comparing = self._run, self._comparing
        run.monitor.status("doctor: the same samples one by one")
        trained = await asyncio.to_thread(comparing.greedy_logprobs, before.samples)
        await judge(own_forward, run.policy, self._reference, before.samples, trained, bound)
        part = [sample for sample in before.sampled if sample.rollout_id in before.rollouts_of(GRADIENT_PROBLEMS)]
        gradient_bound = await asyncio.to_thread(comparing.gradient_bound, part)
        if run.config.trainer.packing is Packing.none:
            why = "trainer.packing=none computes one sample at a time anyway"
            await judge(not_visible, why)
            await judge(not_visible, why)
        else:
            await judge(logprobs, await asyncio.to_thread(comparing.one_by_one, before.samples), bound)
            await judge(packed_gradient, await asyncio.to_thread(comparing.packed_gradient, part), gradient_bound)

        run.monitor.status("doctor: other pixels behind the same tokens")
        smallest = max(FLOAT32.kl, bound.kl / ROUNDING_FACTOR)
        prompts = await self._playing.inverted(before.openings())
        samples = await self._playing.answered(run.engine, prompts)
        swapped = inverted_samples(samples, prompts)
        found = await asyncio.to_thread(comparing.inverted, samples, swapped) if samples else None
        await judge(images_in_trainer, found, smallest)
        few = slice(None, GRADIENT_PROMPTS, 2)  # each second prompt shows inverted pixels itself
        change = await asyncio.to_thread(comparing.inverted_gradient, samples[few], swapped[few]) if samples else None
        await judge(images_in_gradient, change, gradient_bound)
        await judge(images_in_engine, found, bound)

    async def _play(self, version: int) -> Evidence:
        evidence = await self._playing.sampled(self._run.engine, version, self._run.policy)
        self.groups[version] = evidence.groups
        return evidence

    def _change_weights(
        self, evidence: Evidence, smallest: float
    ) -> tuple[StepResult, float, LogprobDifference, float]:
        """Take a real optimizer step, then add noise until the logprobs have changed by more than `smallest`. Returns
        the arguments of the check `update`."""
        sampled = evidence.sampled
        step = self._run.trainer.train_step(
            [dataclasses.replace(sample, advantages=sample.loss_mask.astype(np.float32)) for sample in sampled]
        )

        def change() -> LogprobDifference:
            return LogprobDifference.between(self._comparing.logprobs(sampled), engine_logprobs(sampled))

        return step, *change_weights(self._run.policy, change, smallest), smallest
