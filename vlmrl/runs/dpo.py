"""`mode=dpo`: the supervised warm-up, if `trainer.warmup.steps` asks for one, then steps on preference pairs.

    source of pairs ─▶ learn_pairs ─▶ a line of metrics.jsonl ─▶ evaluation: held-out pairs, and sampled answers

A step counts as a policy version, as in reinforcement learning: schedule, checkpoints, evaluations, `trainer.keep_best`
and `orchestrator.eval.target` work alike. Answers are sampled in evaluations only, where something scores them.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from vlmrl.orchestrator.faults import FaultWatch
from vlmrl.orchestrator.interruption import stopped_before
from vlmrl.orchestrator.length import Length
from vlmrl.orchestrator.loop import ExitReason
from vlmrl.orchestrator.preferences import PairBatch, PairMaker, learn_pairs, score_pairs
from vlmrl.orchestrator.task_threads import TaskThreads
from vlmrl.runs.build import Run
from vlmrl.runs.problems import steps_of
from vlmrl.runs.recorded_pairs import RecordedPairs
from vlmrl.runs.saving import save_if_due
from vlmrl.runs.sft import note, take_supervised_steps
from vlmrl.tasks.border import get_num_rows
from vlmrl.types import Group, PreferencePair


class PairSource(Protocol):
    """Where the pairs of a run come from."""

    @property
    def num_rows(self) -> int | None:
        """How many indices one pass over the training pairs has; None where they are endless."""
        ...

    async def batch(self, step: int) -> PairBatch:
        """The pairs of `step`. Depends on the config, the seed and the place in the data alone."""
        ...

    async def held_out(self) -> list[PreferencePair]:
        """The pairs that evaluations measure, the same each time."""
        ...


async def dpo(run: Run) -> ExitReason:
    """Learn from the policy version that the trainer holds to the last step or the evaluation target."""
    if run.trainer.version == 0 and not await take_supervised_steps(run, run.config.trainer.warmup.steps):
        return "interrupted"
    pairs: PairSource = TaskPairs(run)
    if run.config.dpo.from_run is not None:
        run.monitor.status("reading the recorded rollouts")
        pairs = recorded = await asyncio.to_thread(RecordedPairs.of, run)
        run.monitor.table("pairs", recorded.table())
    return await PreferenceLoop(run, pairs).run()


@dataclass(eq=False)
class TaskPairs:
    """The pairs that the run's task gives."""

    run: Run
    _threads: TaskThreads = field(default_factory=TaskThreads)
    """The task's code may block, and a run that was asked to stop does not wait for it."""
    _held_out: list[PreferencePair] | None = None

    @property
    def num_rows(self) -> int | None:
        return get_num_rows(self.run.task, "train")

    @property
    def _maker(self) -> PairMaker:
        return PairMaker(self.run.task, self.run.renderer, self.run.config.trainer.seq_len)

    async def batch(self, step: int) -> PairBatch:
        indices, count = self.run.position.rl.each(step), self.run.config.dpo.batch_size
        return await self._threads.run(partial(self._maker.batch, step, indices, count))

    async def held_out(self) -> list[PreferencePair]:
        if self._held_out is None:
            drawn = await self.run.evaluator.problems.first(self.run.config.orchestrator.eval.problems)
            self._held_out = await self._threads.run(partial(self._maker.held_out, drawn))
        return self._held_out


@dataclass(eq=False)
class PreferenceLoop:
    """The loop over steps."""

    run_parts: Run
    pairs: PairSource
    length: Length = field(init=False)

    def __post_init__(self) -> None:
        run = self.run_parts
        run.steps = steps_of(run.config, self.pairs.num_rows)
        run.monitor.expect(run.steps)
        self.length = Length(self, run.steps, run.config.trainer.max_epochs)

    def passes(self, step: int) -> float | None:
        """Passes over the training pairs that the weights after `step` have learned from; None where they are
        endless."""
        rows = self.pairs.num_rows
        return None if rows is None else self.run_parts.position.rl.cursor(step).learned / rows

    async def run(self) -> ExitReason:
        """Take the steps that are left; return why the loop ended. Raises as `FaultWatch.check`."""
        run, evaluator = self.run_parts, self.run_parts.evaluator
        run.monitor.phase("dpo")
        first = run.trainer.version
        is_first_due = first == 0 and not evaluator.count and self._is_due(0)
        if is_first_due or evaluator.is_unfinished:
            if not await self._evaluate(first):
                return "interrupted"
            if evaluator.best.is_best(first):
                save_if_due(run, first)
        watch = FaultWatch(run.config.task.max_fault_rate, run.config.output_dir, "pair")
        for step in range(first + 1, run.steps + 1):
            if evaluator.reached_target or evaluator.best.is_exhausted or self.length.is_last(step - 1):
                break
            if not await self._step(step, watch):
                return "interrupted"
            save_if_due(run, step)
        if evaluator.reached_target:
            return "target_reached"
        if evaluator.best.is_exhausted:
            return "no_improvement"
        watch.finish()
        return "finished"

    async def _step(self, step: int, watch: FaultWatch) -> bool:
        """One optimizer step, with its evaluation where that is due. False if the run was told to stop before one of
        both."""
        run, started = self.run_parts, time.perf_counter()
        making = asyncio.create_task(self.pairs.batch(step))
        if await stopped_before(making, run.stop):
            return False
        made = making.result()
        note(run, step, "rl", made)
        prepared = time.perf_counter()
        steps = self.length.decay_steps(step)
        metrics = await asyncio.to_thread(learn_pairs, run.trainer, made.pairs, run.config.dpo, steps)
        trained = time.perf_counter()
        # From here on the weights contain the step, so its evaluation is owed, whatever ends the run before it is made.
        is_due = run.evaluator.is_unfinished = self._is_due(step)
        times = {"time/step": trained - started, "time/train": trained - prepared}
        of_data = {} if (passes := self.passes(step)) is None else {"data/epoch": passes}
        run.monitor.step(step, {"policy_version": float(run.trainer.version), **metrics, **of_data, **times}, None)
        watch.check(step, [Group("pairs", made.rollouts)])
        return not is_due or await self._evaluate(step)

    def _is_due(self, step: int) -> bool:
        """Whether to evaluate after `step`: before the first step, every `eval.every` steps, and after the last."""
        evaluation, last = self.run_parts.config.orchestrator.eval, self.length.last_step(step)
        of_pairs = evaluation.problems > 0 and evaluation.every > 0
        return (of_pairs and (step % evaluation.every == 0 or step == last)) or self.run_parts.evaluator.is_due(
            step, last
        )

    async def _evaluate(self, step: int) -> bool:
        """Measure the held-out pairs, and play what is scored. False if the run was told to stop before."""
        evaluation = asyncio.create_task(self._measured(step))
        if await stopped_before(evaluation, self.run_parts.stop):
            return False
        evaluation.result()
        return True

    async def _measured(self, step: int) -> None:
        run = self.run_parts
        run.evaluator.is_unfinished = True
        held_out = await self.pairs.held_out() if run.config.orchestrator.eval.problems else []
        of_pairs = await asyncio.to_thread(score_pairs, run.trainer, held_out, run.config.dpo)
        await run.weight_sync.publish(run.trainer.version)
        evaluated = await run.evaluator.run(step, self.length.last_step(step), of_pairs)
        run.monitor.evaluation(step, evaluated.metrics, evaluated.rollouts)
