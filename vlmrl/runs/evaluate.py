"""`mode=eval`: one held-out evaluation of the model itself or, with `resume=<run>`, of its newest checkpoint."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from vlmrl.orchestrator.faults import FaultWatch
from vlmrl.orchestrator.interruption import stopped_before
from vlmrl.orchestrator.loop import ExitReason
from vlmrl.runs.build import Run
from vlmrl.types import Rollout


async def evaluate(run: Run) -> ExitReason:
    """Evaluate the weights as they were loaded.

    Raises `TooManyFaultsError` (`EngineError` where the engine failed most often) where every rollout failed; their
    record stays.
    """
    rollouts = await evaluate_after(run, run.restored_step)
    if rollouts is None:
        return "interrupted"
    FaultWatch(run=str(run.run_dir.path)).check_evaluation(rollouts)
    return "finished"


async def evaluate_after(run: Run, step: int, also: Mapping[str, float] | None = None) -> list[Rollout] | None:
    """Evaluate the trainer's weights and record the result as that of `step`, with the metrics `also`; return the
    rollouts, sampled and greedy. None if the run was asked to stop before."""
    run.monitor.phase("eval")
    await run.weight_sync.publish(run.trainer.version)
    evaluation = asyncio.create_task(run.evaluator.run(step))
    if await stopped_before(evaluation, run.stop):
        return None
    metrics, rollouts = evaluation.result()
    run.monitor.evaluation(step, metrics | dict(also or {}), rollouts)
    return [rollout for of_kind in rollouts.values() for rollout in of_kind]
