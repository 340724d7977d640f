"""Run a job that may have been started before: skip it, continue it from its newest checkpoint, or start it.

This is how a sweep is repeated, and how a job that Slurm put back into its queue goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from omegaconf import DictConfig

from vlmrl.cli.sweep.jobs import State, of_the_job, state_of
from vlmrl.config.run import LEARN
from vlmrl.record.run_dir import RunDir


def run_what_is_left(
    config: DictConfig, overrides: Sequence[str], start: Callable[[DictConfig], float | None]
) -> float | None:
    """Skip, continue or start the job of a composed `config` (with its `output_dir`); returns the objective.

    Returns None for a job that failed before when `sweep.retry_failed=false`. Raises ConfigError while another process
    runs the job.
    """
    run_dir = RunDir(config.output_dir)
    with run_dir.lock(str(config.mode.name)):
        state = state_of(run_dir)
        summary = run_dir.read_summary() or {}
        if state is State.finished:
            print(f"{run_dir.name}: skipped, it has finished before")
            objective: float | None = summary.get("objective")
            return objective
        if state is State.failed and not config.sweep.retry_failed:
            print(f"{run_dir.name}: skipped, it failed before (sweep.retry_failed=false): {summary.get('error')}")
            return None
        if state is not State.new and config.mode in LEARN:
            print(f"{run_dir.name}: continues, it was {state.value} before")
            config.resume = str(run_dir.path)
        run_dir.write_overrides(of_the_job(overrides))
        return start(config)
