"""`mode=sft`: supervised steps, then one evaluation. `mode=rl` and `mode=replay` take the same steps as a warm-up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from vlmrl.orchestrator.loop import ExitReason
from vlmrl.orchestrator.supervised import demonstration_samples
from vlmrl.runs.build import Run
from vlmrl.runs.evaluate import evaluate_after
from vlmrl.runs.saving import save_if_due


async def sft(run: Run) -> ExitReason:
    """Take the remaining supervised steps, saving on the way, and evaluate what they made."""
    last = run.config.trainer.warmup.steps

    def save_on_the_way(step: int) -> None:
        if step < last:  # the last step is saved together with its evaluation
            save_if_due(run, step)

    if not await take_supervised_steps(run, save_on_the_way):
        return "interrupted"
    return await evaluate_after(run, run.trainer.supervised_steps)


async def take_supervised_steps(run: Run, after_step: Callable[[int], None] | None = None) -> bool:
    """Take the supervised steps (`trainer.warmup`) that the weights do not contain yet.

    `after_step` is called with the number of each step, from 1. Returns False if the run was asked to stop.
    """
    warmup = run.config.trainer.warmup
    if run.trainer.supervised_steps < warmup.steps:
        run.monitor.phase("warm-up")
    for step in range(run.trainer.supervised_steps + 1, warmup.steps + 1):
        samples = demonstration_samples(run.task, run.renderer, warmup, step=step - 1, seed=run.config.seed)
        metrics = await asyncio.to_thread(run.trainer.supervised_step, samples, warmup.learning_rate)
        run.monitor.warmup(step, warmup.steps, metrics)
        if after_step is not None:
            after_step(step)
        if run.stop.is_set():
            return False
    return True
