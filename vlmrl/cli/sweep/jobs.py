"""The jobs of a sweep: their names and their states.

    overrides ─▶ job_name ─▶ its folder ─▶ state_of ─┬─ new                     start
                                                     ├─ finished                skip; summary.json has the objective
                                                     ├─ stopped, killed         resume from the newest checkpoint
                                                     ├─ failed                  resume, or only list it
                                                     └─ running                 leave it to its process

A job is identified by its overrides: they make the name of its folder, so a sweep that is started again finds the
folders of its earlier jobs. A Slurm job that was put back into the queue is found in the same way.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from enum import Enum
from pathlib import Path

from vlmrl.cli.recipe import RECIPE
from vlmrl.errors import ConfigError
from vlmrl.record.lock import holder_of
from vlmrl.record.run_dir import RunDir

NOT_OF_THE_JOB = ("sweep", "monitor")
"""Groups that change how jobs are started and watched, but not what they compute."""

NAME_LENGTH = 120
"""Longest name of a job, in characters; file systems allow 255 bytes."""


def job_name(overrides: Sequence[str], default: str) -> str:
    """The name of a job's folder; `default` for a job without overrides.

    The order of the overrides does not matter. Characters that a file system may refuse become `_`, and a hash keeps
    different jobs apart.

    >>> job_name(["seed=1", "+sweep=algorithms", "algorithm=rloo"], "tiny")
    'algorithm=rloo,seed=1'
    >>> job_name([], "tiny")
    'tiny'
    >>> job_name(["model.name=Qwen/Qwen3-VL-4B"], "tiny")
    'model.name=Qwen_Qwen3-VL-4B-94d334'
    """
    exact = ",".join(of_the_job(overrides))
    name = re.sub(r"[^\w.,=~+-]", "_", exact)[:NAME_LENGTH]
    if name != exact:
        name = f"{name}-{hashlib.sha256(exact.encode()).hexdigest()[:6]}"
    return name or default


def of_the_job(overrides: Sequence[str]) -> list[str]:
    """The overrides that identify a job, sorted.

    The recipe is left out, because a job without it means the same.

    >>> of_the_job(["+task.args.level=1", "+sweep=algorithms", "algorithm=rloo", "monitor.live=false"])
    ['algorithm=rloo', 'task.args.level=1']
    >>> of_the_job(["seed=1", "experiment=color_codeword_tiny"])
    ['seed=1']
    """
    bare = (text.lstrip("+") for text in overrides if text != RECIPE)
    return sorted(text for text in bare if re.split(r"[./=]", text)[0] not in NOT_OF_THE_JOB)


class State(Enum):
    """The state of a run, as its folder shows it."""

    new = "new"
    """It has written nothing yet."""
    running = "running"
    """A process is running it."""
    stopped = "stopped"
    """It was interrupted and wrote a checkpoint."""
    killed = "killed"
    """It ended without a summary.json."""
    failed = "failed"
    """It ended with an error."""
    finished = "finished"
    """It has done all its steps or reached its target."""


def state_of(run_dir: RunDir) -> State:
    """The state of a run. A run whose folder this process has locked itself does not count as running."""
    if holder_of(run_dir.path) is not None:
        return State.running
    if not run_dir.config.exists():
        return State.new
    summary = run_dir.read_summary()
    if summary is None:
        return State.killed
    ends = {"error": State.failed, "interrupted": State.stopped}
    return ends.get(summary["exit_reason"], State.finished)


# ── a sweep's folder ────────────────────────────────────────────────────────────────────────────────────────


def runs_in(folder: Path) -> list[RunDir]:
    """The run in `folder`, or the runs of a multirun in it. Raises ConfigError if it is neither.

    The runs are sorted by their overrides, of which a folder's name may hold only the beginning; a run without any, by
    its name.

    The folder of a job that has not started, or that ended before it wrote anything, counts as a run.
    """
    if RunDir(folder).config.exists():
        return [RunDir(folder)]
    runs = [RunDir(path) for path in sorted(folder.glob("[!.]*")) if path.is_dir() and not path.is_symlink()]
    if not any(run.config.exists() for run in runs) and not (folder / "multirun.yaml").exists():
        raise ConfigError(
            f"runs: {folder} is neither a run nor a multirun, so it cannot be compared: name another folder"
        )
    return sorted(runs, key=lambda run: of_the_job(run.read_overrides() or ()) or [run.name])
