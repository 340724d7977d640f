"""The training loop: from problems to new weights, step by step.

    task ─▶ renderer ─▶ inference ─▶ rollout ─▶ advantages ─▶ samples ─▶ packing ─▶ trainer ─▶ weight sync ─▶ inference
     env     tokens +     token ids    turns,     per group     one per    micro-      forward,    version v+1
             pixels       + logprobs   stop       filters       branch     batches     loss, step
                          + versions   reason
            └──────────── roll_out(step) ────────┘└─────── learn(step) ──────────────┘└─ publish ─┘

One loop serves on-policy and asynchronous runs. The groups of all steps are one stream. A group of step s starts when
the policy has made s − 1 − max_staleness steps, so no token is older than max_staleness steps when the trainer learns
from it. With max_staleness=0, rolling out, learning and publishing take turns. Above 0, max_staleness batches of
rollouts play at a time, and a group starts as others end (admission.py). What does not depend on the weights (problems,
envs, prompts, and their images on the way to the servers) is made ahead, while the step before is learned (opening.py).
With a second model (`reference=`), learning begins with its scores, before rewards are compared.

Left out on purpose: faults of one rollout (rollout.py), a run whose rollouts all fail (faults.py), and all output
(recorder.py).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Literal

from vlmrl.config.algorithm import Advantage, AlgorithmConfig
from vlmrl.config.orchestrator import OrchestratorConfig
from vlmrl.errors import NonFiniteLossError
from vlmrl.orchestrator.admission import Admission
from vlmrl.orchestrator.advantages import assign_advantages, mark_dropped
from vlmrl.orchestrator.credit import credit_metrics, reference_metrics
from vlmrl.orchestrator.evaluation import Evaluator
from vlmrl.orchestrator.faults import FaultWatch
from vlmrl.orchestrator.filters import find_filtered
from vlmrl.orchestrator.gae import whiten
from vlmrl.orchestrator.interruption import stopped_before
from vlmrl.orchestrator.length import Length
from vlmrl.orchestrator.metrics import Overlap, rollout_metrics, throughput_metrics, time_metrics
from vlmrl.orchestrator.recorder import Recorder
from vlmrl.orchestrator.refill import refill_metrics, sample_groups
from vlmrl.orchestrator.rollout import RolloutRunner
from vlmrl.orchestrator.samples import make_samples, note_before, note_learned, note_reference
from vlmrl.orchestrator.stream import Drawn, ProblemStream
from vlmrl.orchestrator.vision_advantage import weigh_by_vision
from vlmrl.types import Group, InferenceEngine, Rollout, Trainer, TrainingSample, WeightSync

ExitReason = Literal["finished", "target_reached", "no_improvement", "blind", "interrupted"]
"""`no_improvement`: `trainer.patience` evaluations in a row were no better than the best one. `blind`: the reward rises
although the policy ignores its images, and `monitor.blind_guard=stop`."""


@dataclass(eq=False)
class Loop:
    """The parts of a run and the loop over them."""

    config: OrchestratorConfig
    algorithm: AlgorithmConfig
    length: Length
    vocab_size: int
    """Number of tokens that the sampler chooses from."""
    runner: RolloutRunner
    engine: InferenceEngine
    trainer: Trainer
    weight_sync: WeightSync
    evaluator: Evaluator
    recorder: Recorder
    problems: ProblemStream
    """The training problems."""
    checkpoint: Callable[[int], None]
    """Called with the number of each step after it; saves a checkpoint when one is due."""
    demonstrations: Callable[[int], Coroutine[Any, Any, list[TrainingSample]]]
    """Returns the supervised samples that join a step's batch; empty without `trainer.warmup.rl_weight`."""
    vision_gap: Callable[[int, list[TrainingSample]], dict[str, float]]
    """Returns the metrics of the blind control on a step's samples; empty where it is not due."""
    has_reference: bool
    """Whether the trainer has a second model, which scores what was sampled."""
    stop: asyncio.Event
    """Set by Ctrl-C: the loop ends before the next step is trained, and an evaluation is cut short."""
    faults: FaultWatch = field(default_factory=FaultWatch)
    _pending: dict[int, asyncio.Task[list[Group]]] = field(default_factory=dict)
    _opening: dict[int, asyncio.Task[list[Drawn]]] = field(default_factory=dict)
    """Step → the problems of its first groups, opened ahead."""
    _overlap: Overlap = field(default_factory=Overlap)

    def __post_init__(self) -> None:
        places = self.config.max_staleness * self.config.groups_per_step * self.config.group_size
        self._admission = Admission(places) if places else None

    async def run(self) -> ExitReason:
        """Run the steps from the trainer's version to the last one; return why the loop ended. Raises as
        `FaultWatch.check`, at the end also where there were too few steps for it to judge."""
        first = self.trainer.version
        await self.weight_sync.publish(first)
        length = self.length
        is_first_due = first == 0 and not self.evaluator.count and self.evaluator.is_due(0, length.max_steps)
        if is_first_due or self.evaluator.is_unfinished:
            if not await self.evaluate(first):
                return "interrupted"
            if self.evaluator.best.is_best(first):
                self.checkpoint(first)
        try:
            for step in range(first + 1, length.max_steps + 1):
                if self._is_over or length.is_last(step - 1):
                    break
                started = time.perf_counter()
                if (groups := await self.next_batch(step)) is None:
                    return "interrupted"
                if not await self.learn(step, groups, started):
                    return "interrupted"
            if self.evaluator.reached_target:
                return "target_reached"
            if self.evaluator.best.is_exhausted:
                return "no_improvement"
            if self.recorder.ends_blind:
                return "blind"
            self.faults.finish()
            return "finished"
        finally:
            await self._abandon()

    async def _abandon(self) -> None:
        """Cancel the rollouts that are playing, and close the envs that were opened ahead."""
        under_way = *self._pending.values(), *self._opening.values()
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)
        for opening in self._opening.values():
            if not opening.cancelled() and opening.exception() is None:
                await self.runner.discard(opening.result())

    @property
    def _is_over(self) -> bool:
        """Whether the run ends before its last step."""
        return self.evaluator.reached_target or self.evaluator.best.is_exhausted or self.recorder.ends_blind

    async def next_batch(self, step: int) -> list[Group] | None:
        """Wait for the groups of `step`, after starting every later batch that max_staleness allows. None when the run
        was told to stop."""
        for ahead in range(step, min(step + self.config.max_staleness, self.length.max_steps) + 1):
            if ahead not in self._pending:
                self._pending[ahead] = asyncio.create_task(self.roll_out(ahead))
        stopped = asyncio.create_task(self.stop.wait())
        await asyncio.wait({self._pending[step], stopped}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        return None if self.stop.is_set() else await self._pending.pop(step)

    def open_ahead(self, step: int) -> None:
        """Begin to draw and open the first groups of `step`, unless the run ends before it, or a curriculum chooses
        its problems by rewards that are not known yet."""
        if step <= self.length.max_steps and self.problems.chooser is None:
            self._opening[step] = asyncio.create_task(self._open(step))

    async def _open(self, step: int) -> list[Drawn]:
        drawn = await self.problems.draw(step, self.config.groups_per_step)
        return [self.runner.open_ahead(each, self.config.group_size) for each in drawn]

    async def roll_out(self, step: int) -> list[Group]:
        """task → renderer → inference → rollout: play the groups of one step."""

        async def draw(count: int) -> list[Drawn]:
            if (opening := self._opening.get(step)) is None:
                return await self.problems.draw(step, count)
            drawn = await opening
            del self._opening[step]  # not before, so that a run that ends meanwhile closes the envs
            return drawn

        async def play(problems: list[Drawn], first_group: int) -> list[Group]:
            return await self.runner.run_groups(
                split="train",
                step=step,
                problems=problems,
                group_size=self.config.group_size,
                temperature=self.config.temperature,
                first_group=first_group,
                admission=self._admission,
            )

        with self._overlap.rolling_out(step):
            return await sample_groups(self.config.groups_per_step, self.algorithm, draw, play)

    async def learn(self, step: int, groups: list[Group], started: float) -> bool:
        """advantages → samples → packing → trainer → weight sync: one optimizer step and its metrics. Returns False if
        the run was told to stop while the task's code made demonstrations, before the step, or played an evaluation
        after it."""
        rolled_out = time.perf_counter()
        self.open_ahead(step + 1 + self.config.max_staleness)
        version, image_tokens = self.trainer.version, self.runner.renderer.image_token_ids
        scored = await self.score_by_reference(groups) | await self.estimate_values(groups)
        for group in groups:
            assign_advantages(group, self.algorithm)
            find_filtered(group, self.algorithm.filters, self.vocab_size)
            mark_dropped(group, self.algorithm, image_tokens, version, self.config.max_staleness)
        whiten(groups, self.algorithm)
        looks = await asyncio.to_thread(weigh_by_vision, groups, self.trainer, self.algorithm.vision_advantage)
        kl = self.algorithm.kl.advantage
        samples = [s for group in groups for r in group.rollouts if r.dropped is None for s in make_samples(r, kl)]
        gap = await asyncio.to_thread(self.vision_gap, step, samples)
        prepared = time.perf_counter()
        demonstrations = asyncio.create_task(self.demonstrations(step))
        if await stopped_before(demonstrations, self.stop):
            return False
        try:
            steps = self.length.decay_steps(step)
            result = await asyncio.to_thread(self.trainer.train_step, samples, demonstrations.result(), steps)
        except NonFiniteLossError:
            self.recorder.record(step, groups)  # the error message names samples, which must be in the record
            raise
        trained = time.perf_counter()
        # From here on the weights contain the step, so its evaluation is owed, whatever ends the run before it is made.
        self.problems.learn(step, groups)
        is_due = self.evaluator.is_due(step, self.length.last_step(step))
        self.evaluator.is_unfinished = is_due
        note_learned((rollout for group in groups for rollout in group.rollouts), result.tokens)
        try:
            await self.weight_sync.publish(result.version)
        finally:  # a run whose servers fail here ends, and is saved with this step
            synced = time.perf_counter()
            metrics = {
                "policy_version": float(result.version),
                **(rollout_metrics(groups, self.algorithm.filters) | credit_metrics(groups, self.algorithm)),
                **(refill_metrics(groups, self.config.groups_per_step, self.algorithm) | self.problems.metrics(step)),
                **(result.metrics | scored | looks | gap),
                **self.engine.metrics(),
                **throughput_metrics(groups, seconds=synced - started),
                **(time_metrics(started, rolled_out, prepared, trained, synced) | self._overlap.metrics(step)),
            }
            self.recorder.step(step, metrics, groups)
        self.faults.check(step, groups)
        if is_due and not await self.evaluate(step):
            return False
        self.checkpoint(step)
        return True

    async def score_by_reference(self, groups: list[Group]) -> dict[str, float]:
        """Let the reference score what was sampled, before rewards are compared → `time/reference`, in seconds. Empty
        without a reference."""
        if not self.has_reference:
            return {}
        started = time.perf_counter()
        played, samples = _played(groups)
        note_reference(played, await asyncio.to_thread(self.trainer.reference_scores, samples))
        return {"time/reference": time.perf_counter() - started, **reference_metrics(played, self.algorithm)}

    async def estimate_values(self, groups: list[Group]) -> dict[str, float]:
        """Let the trainer's value head judge what was sampled, before advantages are computed from its values →
        `time/values`, in seconds. Empty unless `algorithm.advantage=gae`."""
        if self.algorithm.advantage != Advantage.gae:
            return {}
        started = time.perf_counter()
        played, samples = _played(groups)
        note_before(played, await asyncio.to_thread(self.trainer.token_metrics, samples))
        return {"time/values": time.perf_counter() - started}

    async def evaluate(self, step: int) -> bool:
        """Evaluate the weights after `step` on held-out problems. Returns False if the run was told to stop before."""
        evaluation = asyncio.create_task(self.evaluator.run(step, self.length.last_step(step)))
        if await stopped_before(evaluation, self.stop):
            return False
        evaluated = evaluation.result()
        # Read the engine's counters here too; otherwise the next step would include those of the evaluation.
        counters = {f"eval/{key}": value for key, value in self.engine.metrics().items()}
        self.recorder.evaluation(step, evaluated.metrics | counters, evaluated.rollouts)
        self._overlap.reset_idle()
        return True


def _played(groups: list[Group]) -> tuple[list[Rollout], list[TrainingSample]]:
    """The rollouts that may be learned from, before it is decided which are dropped, and their samples."""
    played = [r for group in groups for r in group.rollouts if not r.stop_reason.is_fault and r.dropped is None]
    return played, [sample for rollout in played for sample in make_samples(rollout)]
