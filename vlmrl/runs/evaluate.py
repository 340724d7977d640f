"""`mode=eval`: one held-out evaluation of the model itself or, with `resume=<run>`, of its newest checkpoint."""

from __future__ import annotations

import asyncio

from vlmrl.orchestrator.interruption import stopped_before
from vlmrl.orchestrator.loop import ExitReason
from vlmrl.runs.build import Run


async def evaluate(run: Run) -> ExitReason:
    """Evaluate the weights as they were loaded."""
    return await evaluate_after(run, run.restored_step)


async def evaluate_after(run: Run, step: int) -> ExitReason:
    """Evaluate the trainer's weights and record the result as that of `step`, unless the run is asked to stop."""
    run.monitor.phase("eval")
    await run.weight_sync.publish(run.trainer.version)
    evaluation = asyncio.create_task(run.evaluator.run(step))
    if await stopped_before(evaluation, run.stop):
        return "interrupted"
    run.monitor.evaluation(step, *evaluation.result())
    return "finished"
