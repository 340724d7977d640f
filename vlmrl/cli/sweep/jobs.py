"""The jobs of a sweep: what one is called, how far it is, and who works on it.

    overrides ─▶ job_name ─▶ its folder ─▶ state_of ─┬─ new                     start
                                                     ├─ finished                skip; its objective is in summary.json
                                                     ├─ stopped, killed         resume from the newest checkpoint
                                                     ├─ failed                  the same, or listed only
                                                     └─ running                 leave alone

A job is its overrides: the folder's name is made of them, so the same sweep started again finds what it did before. A
job of Slurm that was put back into the queue is found in the same way.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import time
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path

from vlmrl.cli.recipe import RECIPE
from vlmrl.errors import ConfigError
from vlmrl.record.files import disk_errors
from vlmrl.record.run_dir import RunDir

NOT_OF_THE_JOB = ("sweep", "monitor")
"""Groups that say how jobs are started and watched, not what they do."""

NAME_LENGTH = 120
"""Characters of a job's name; file systems allow 255 bytes."""

CLAIM_S = 1.0
"""Seconds to try for a claim: whoever looks at a run's state holds it for a moment."""


def job_name(overrides: Sequence[str], default: str) -> str:
    """The folder of a job; `default` for the job without overrides.

    The order of overrides does not matter. What a file system may not take is replaced and told apart by a hash.

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
    """The overrides that make a job what it is, sorted.

    The recipe is left out, because a job without it means the same.

    >>> of_the_job(["+task.args.level=1", "+sweep=algorithms", "algorithm=rloo", "monitor.live=false"])
    ['algorithm=rloo', 'task.args.level=1']
    >>> of_the_job(["seed=1", "experiment=color_codeword_tiny"])
    ['seed=1']
    """
    bare = (text.lstrip("+") for text in overrides if text != RECIPE)
    return sorted(text for text in bare if re.split(r"[./=]", text)[0] not in NOT_OF_THE_JOB)


class State(Enum):
    """How far a run is, by its folder."""

    new = "new"
    """Nothing was kept of it yet."""
    running = "running"
    """A living process works on it."""
    stopped = "stopped"
    """It was asked to stop, and did."""
    killed = "killed"
    """It ended without a word."""
    failed = "failed"
    """It ended by an error."""
    finished = "finished"
    """It is done: all its steps, or its target."""


def state_of(run_dir: RunDir, *, claimed_by_us: bool = False) -> State:
    """How far the run is; what `claimed_by_us` is not `running`."""
    if not claimed_by_us and is_claimed(run_dir.path):
        return State.running
    if not run_dir.config.exists():
        return State.new
    summary = run_dir.read_summary()
    if summary is None:
        return State.killed
    ends = {"error": State.failed, "interrupted": State.stopped}
    return ends.get(summary["exit_reason"], State.finished)


# ── one process at a time ───────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def claim(folder: Path) -> Iterator[bool]:
    """Hold a run's folder, which is made, while the block runs; yields False where a living process holds it.

    The hold ends with the process, however that ends. A file system without locks holds nothing back.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        until = time.monotonic() + CLAIM_S
        while not (held := _lock(file)) and time.monotonic() < until:
            time.sleep(0.05)
        yield held
    finally:
        os.close(file)


def is_claimed(folder: Path) -> bool:
    """Whether a living process holds the folder. The answer may be old when it is read."""
    try:
        file = os.open(folder / LOCK, os.O_RDWR)
    except OSError:  # nobody ever held it, or it is not ours to write: then we cannot run it either
        return False
    try:
        return not _lock(file)
    finally:
        os.close(file)


LOCK = ".lock"
"""In a run's folder; empty. The lock is the kernel's, the file stays."""


def _lock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # no locks on this file system
        return True
    return True


# ── a sweep's folder ────────────────────────────────────────────────────────────────────────────────────────


def runs_in(folder: Path) -> list[RunDir]:
    """The run that `folder` is, or those that a multirun keeps in it, by name. Raises ConfigError where it is neither.

    A folder of a job that has not begun, or ended before it kept anything, counts as a run.
    """
    if RunDir(folder).config.exists():
        return [RunDir(folder)]
    runs = [RunDir(path) for path in sorted(folder.glob("[!.]*")) if path.is_dir() and not path.is_symlink()]
    if not any(run.config.exists() for run in runs) and not (folder / "multirun.yaml").exists():
        raise ConfigError(
            f"runs: {folder} is neither a run nor a multirun, so there is nothing of it to compare: name another folder"
        )
    return runs
