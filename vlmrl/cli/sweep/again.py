"""Run a job that may have been started before: skip it, continue it from its newest checkpoint, or start it.

This is how a sweep is repeated, and how a job that Slurm put back into its queue goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from omegaconf import DictConfig

from vlmrl.cli.sweep.jobs import State, claim, of_the_job, state_of
from vlmrl.config.run import Mode
from vlmrl.errors import VlmrlError
from vlmrl.record.run_dir import RunDir

RESUMABLE = (Mode.rl, Mode.sft)
"""Modes that write checkpoints. Jobs of other modes start from the beginning."""


def run_what_is_left(
    config: DictConfig, overrides: Sequence[str], start: Callable[[DictConfig], float | None]
) -> float | None:
    """Skip, continue or start the job of a composed `config` (with its `output_dir`); returns the objective.

    Returns None for a job that failed before when `sweep.retry_failed=false`. Raises VlmrlError while another process
    runs the job.
    """
    run_dir = RunDir(config.output_dir)
    with claim(run_dir.path) as is_held:
        if not is_held:
            raise VlmrlError(
                f"another process is running the job in {run_dir.path}, so it is not started a second time: wait until "
                "it ends, or stop it"
            )
        state = state_of(run_dir, claimed_by_us=True)
        summary = run_dir.read_summary() or {}
        if state is State.finished:
            print(f"{run_dir.name}: skipped, it has finished before")
            objective: float | None = summary["objective"]
            return objective
        if state is State.failed and not config.sweep.retry_failed:
            print(f"{run_dir.name}: skipped, it failed before (sweep.retry_failed=false): {summary.get('error')}")
            return None
        if state is not State.new and config.mode in RESUMABLE:
            print(f"{run_dir.name}: continues, it was {state.value} before")
            config.resume = str(run_dir.path)
        run_dir.write_overrides(of_the_job(overrides))
        return start(config)
