"""`mode=sft`: supervised steps with a held-out loss, which may end them early, then one evaluation. `mode=rl`,
`mode=dpo` and `mode=replay` take the same steps as a warm-up."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

from vlmrl.config.run import Mode
from vlmrl.orchestrator.faults import FaultWatch
from vlmrl.orchestrator.interruption import stopped_before
from vlmrl.orchestrator.loop import ExitReason
from vlmrl.orchestrator.supervised import Demonstrated, Made, demonstrate, held_out, loss_of
from vlmrl.orchestrator.task_threads import TaskThreads
from vlmrl.record.faults import faults_of
from vlmrl.record.metrics import DEMONSTRATION_LOSS
from vlmrl.record.step_log import Phase
from vlmrl.runs.build import Run
from vlmrl.runs.evaluate import evaluate_after
from vlmrl.runs.saving import save_if_due
from vlmrl.tasks.border import get_num_rows
from vlmrl.types import Group, TrainingSample


async def sft(run: Run) -> ExitReason:
    """Take the remaining supervised steps, saving on the way, and evaluate what they made."""
    last = run.steps

    def save_on_the_way(step: int) -> None:
        if step < last:  # the last step is saved together with its evaluation
            save_if_due(run, step)

    held_out_loss = HeldOutLoss(run)
    if not await take_supervised_steps(run, last, save_on_the_way, held_out_loss.when_due):
        return "interrupted"
    rollouts = await evaluate_after(run, run.trainer.supervised_steps, await held_out_loss.measure())
    if rollouts is None:
        return "interrupted"
    return "no_improvement" if run.evaluator.best.is_exhausted else "finished"


@dataclass(eq=False)
class HeldOutLoss:
    """The loss on demonstrations of the held-out problems, `eval/demonstration_loss`."""

    run: Run
    _samples: list[TrainingSample] | None = None

    async def when_due(self, step: int) -> dict[str, float]:
        """The loss after supervised step `step`, which counts for `trainer.keep_best` and `trainer.patience`; empty
        where `orchestrator.eval.every` does not ask for it."""
        every, last = self.run.config.orchestrator.eval.every, self.run.steps
        if every == 0 or not (step % every == 0 or step == last):
            return {}
        measured = await self.measure()
        self.run.evaluator.best.note(step, measured)
        return measured

    async def measure(self) -> dict[str, float]:
        """The loss of the weights as they are; empty where no held-out problem has a demonstration."""
        config = self.run.config
        if self._samples is None:
            drawn = await self.run.evaluator.problems.first(config.orchestrator.eval.problems)
            making = partial(held_out, self.run.task, self.run.renderer, config.trainer.warmup, drawn)
            self._samples = await TaskThreads().run(partial(making, seed=config.seed, seq_len=config.trainer.seq_len))
        if not self._samples:
            return {}
        return {DEMONSTRATION_LOSS: await asyncio.to_thread(loss_of, self.run.trainer, self._samples)}


async def no_metrics(step: int) -> dict[str, float]:
    return {}


async def take_supervised_steps(
    run: Run,
    last: int,
    after_step: Callable[[int], None] | None = None,
    more_metrics: Callable[[int], Awaitable[dict[str, float]]] = no_metrics,
) -> bool:
    """Take the supervised steps (`trainer.warmup`) until step `last` that the weights do not contain yet. With mode=sft
    they end after the passes of `trainer.max_epochs`, and where the held-out loss no longer falls
    (`trainer.patience`).

    A demonstration that fails is recorded, and the step goes on with the others. `after_step` is called with the number
    of each step, from 1, and so is `more_metrics`, whose result joins the step's line in supervised.jsonl. Returns
    False if the run was asked to stop.

    Raises `TaskError` where the task has no demonstrations, `TooManyFaultsError` where too many fail.
    """
    warmup = run.config.trainer.warmup
    if run.trainer.supervised_steps < last:
        run.monitor.phase("warm-up")
    watch = FaultWatch(run.config.task.max_fault_rate, run.config.output_dir, "demonstration")
    threads = TaskThreads()
    for step in range(run.trainer.supervised_steps + 1, last + 1):
        if run.config.mode is Mode.sft and (is_over(run, step - 1) or run.evaluator.best.is_exhausted):
            break
        making = asyncio.create_task(demonstrations_of(run, step, threads))
        if await stopped_before(making, run.stop):
            return False
        made = making.result()
        note(run, step, "supervised", made)
        metrics = await asyncio.to_thread(run.trainer.supervised_step, made.samples, warmup.learning_rate)
        run.monitor.warmup(step, last, metrics | await more_metrics(step))
        watch.check(step, [Group("demonstrations", made.rollouts)])
        if after_step is not None:
            after_step(step)
        if run.stop.is_set():
            return False
    watch.finish()
    return True


def is_over(run: Run, step: int) -> bool:
    """Whether supervised step `step` ends the passes that `trainer.max_epochs` allows."""
    epochs, rows = run.config.trainer.max_epochs, get_num_rows(run.task, "train")
    return epochs is not None and rows is not None and run.position.warmup.cursor(step).learned >= epochs * rows


async def demonstrations_of(run: Run, step: int, threads: TaskThreads) -> Demonstrated:
    """The demonstrations of supervised step 1, 2, …, made in a daemon thread: the task's code may block, and a run that
    was asked to stop does not wait for it."""
    config = run.config
    return await threads.run(
        partial(
            demonstrate,
            run.task,
            run.renderer,
            config.trainer.warmup,
            step=step - 1,
            numbers=run.position.warmup.each(step),
            seed=config.seed,
            seq_len=config.trainer.seq_len,
        )
    )


def note(run: Run, step: int, phase: Phase, made: Made) -> None:
    """Record the demonstrations or pairs that failed, and the rows without one, before `step` was taken.

    Raises `BadRowsError` where the settings say that the run stops there.
    """
    run.problems.bad_rows.used(len(made.rollouts))
    for index, why in made.absent:
        run.problems.bad_rows.absent(phase, "train", step, index, why)
    if not made.faults:
        return
    run.monitor.faults([{**fault, "split": "train"} for fault in faults_of(step, phase, made.faults)])
    run.monitor.warn(
        f"Some {'pairs' if run.config.mode is Mode.dpo and phase == 'rl' else 'demonstrations'} failed and were left "
        "out: python -m vlmrl mode=faults "
        f"run={run.config.output_dir} lists them."
    )
