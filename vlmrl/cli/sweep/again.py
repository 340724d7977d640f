"""A job that may have been started before: whatever is left of it is run.

a job of a sweep, a job that Slurm put back into its queue ─▶ run_what_is_left ─▶ the run, from its newest checkpoint
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from omegaconf import DictConfig

from vlmrl.cli.sweep.jobs import State, claim, of_the_job, state_of
from vlmrl.config.run import Mode
from vlmrl.errors import VlmrlError
from vlmrl.record.run_dir import RunDir

RESUMABLE = (Mode.rl, Mode.sft)
"""Modes that keep checkpoints; the others are done again."""


def run_what_is_left(
    config: DictConfig, overrides: Sequence[str], start: Callable[[DictConfig], float | None]
) -> float | None:
    """Start `config` (composed, with its `output_dir`), continue it, or leave it alone; returns the objective.

    None for a job that failed before and is not to be tried again. Raises VlmrlError where another process works on it.
    """
    run_dir = RunDir(config.output_dir)
    with claim(run_dir.path) as is_held:
        if not is_held:
            raise VlmrlError(
                f"{run_dir.path} is being run by another process, so this job is left to it: wait for it, or stop it"
            )
        state = state_of(run_dir, claimed_by_us=True)
        summary = run_dir.read_summary() or {}
        if state is State.finished:
            print(f"{run_dir.name}: finished before, skipped")
            objective: float | None = summary["objective"]
            return objective
        if state is State.failed and not config.sweep.retry_failed:
            print(f"{run_dir.name}: failed before, not tried again (sweep.retry_failed=false): {summary.get('error')}")
            return None
        if state is not State.new and config.mode in RESUMABLE:
            print(f"{run_dir.name}: {state.value} before, continues")
            config.resume = str(run_dir.path)
        run_dir.write_overrides(of_the_job(overrides))
        return start(config)
