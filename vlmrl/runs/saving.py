"""Checkpoints while a run goes on. Restoring is part of the lifecycle (lifecycle.py)."""

from __future__ import annotations

from vlmrl.runs.build import Run
from vlmrl.trainer.loop_state import LoopState


def save_if_due(run: Run, step: int) -> None:
    """Save after `step` where `trainer.checkpoint_every` divides it, or where its evaluation is the best so far.

    Raises VlmrlError where the checkpoint before it, or what was recorded before that, could not be written.
    """
    run.checkpoints.check()
    every = run.config.trainer.checkpoint_every
    if (every and step % every == 0) or run.evaluator.best.is_best(step):
        save(run, step)


def save(run: Run, step: int) -> None:
    """Save a checkpoint called after `step`, unless the newest checkpoint already holds this progress. It is complete,
    some time after the call, only if what the run has recorded is on the disk."""
    if run.progress == run.saved:
        return
    recorded = run.monitor.flush_lines()
    run.checkpoints.save(step, run.trainer, loop_state(run), recorded)
    if run.config.monitor.wandb.checkpoints:
        run.checkpoints.finish()  # W&B uploads the files, so they must be complete
        run.monitor.checkpoint(step, run.checkpoints.path(step))
    run.saved = run.progress


def loop_state(run: Run) -> LoopState:
    """The evaluations so far, the place in each sequence of problems, and what is known of each."""
    cursors = run.position.after(run.trainer.version, run.trainer.supervised_steps)
    return LoopState(
        evaluations=tuple(run.evaluator.history),
        evaluation_count=run.evaluator.count,
        best=run.evaluator.best.best,
        is_evaluation_unfinished=run.evaluator.is_unfinished,
        cursor=cursors.rl,
        warmup_cursor=cursors.warmup,
        rl_demonstrations_cursor=cursors.rl_demonstrations,
        difficulty=None if run.curriculum is None else run.curriculum.state(),
    )
