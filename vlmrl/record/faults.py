"""faults.jsonl: what the user's code or data did wrong, one JSON object per fault, in the order in which it happened.

    {"step": 3, "phase": "rl", "rollout_id": "train/000003/01/00", "problem_id": "row 9", "split": "train",
     "problem_index": 9, "stop_reason": "task_error", "error": "step() raised KeyError: …", "traceback": "…"}

The file is absent while nothing went wrong. A resumed run first removes the lines of the steps that it repeats, so a
run that was killed and resumed has the same lines as one that was not. `mode=faults` shows the file.
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypedDict

import orjson

from vlmrl.errors import safe_text
from vlmrl.record.files import disk_errors, write_bytes_atomically
from vlmrl.record.in_place import check_in_place
from vlmrl.record.lines import read_lines
from vlmrl.types import Rollout

log = logging.getLogger(__name__)

FaultPhase: TypeAlias = Literal["supervised", "eval", "rl"]


class FaultRecord(TypedDict):
    """One line of faults.jsonl."""

    step: int
    """The supervised step ("supervised"), the RL step ("rl"), or the RL step after which was evaluated ("eval")."""
    phase: FaultPhase
    rollout_id: str
    """The rollout or the demonstration that was lost."""
    problem_id: str
    """`<split>[<index>]` where the problem itself could not be made."""
    split: str
    """`train` or `eval`: with `problem_index` the arguments of the task's `problem`."""
    problem_index: int
    stop_reason: str
    """A value of `StopReason`."""
    error: str
    traceback: str | None
    """Of the original exception; None where the task returned something wrong."""


def faults_of(step: int, phase: FaultPhase, rollouts: Iterable[Rollout]) -> list[FaultRecord]:
    """The records of those rollouts that ended by a fault."""
    return [
        {
            "step": step,
            "phase": phase,
            "rollout_id": rollout.rollout_id,
            "problem_id": rollout.problem_id,
            "split": rollout.rollout_id.partition("/")[0].removesuffix("-greedy"),
            "problem_index": rollout.problem_index,
            "stop_reason": rollout.stop_reason.value,
            "error": rollout.error or "",
            "traceback": rollout.traceback,
        }
        for rollout in rollouts
        if rollout.stop_reason.is_fault
    ]


def most_frequent(faults: Sequence[tuple[str, str]]) -> tuple[str, str, int]:
    """The most frequent reason among (stop reason, error) pairs: its stop reason, the error of its first fault, and
    how many faults have it. Numbers in the errors are ignored: they name the row.

    >>> most_frequent([("task_error", "no row 3"), ("bad_reward", "reward=nan"), ("task_error", "no row 12")])
    ('task_error', 'no row 3', 2)
    """
    kinds = [fault_kind(*fault) for fault in faults]
    kind, count = Counter(kinds).most_common(1)[0]
    stop_reason, error = faults[kinds.index(kind)]
    return stop_reason, error, count


def fault_kind(stop_reason: str, error: str) -> tuple[str, str]:
    """Equal for faults that have the same reason: the error without its numbers and addresses.

    >>> fault_kind("task_error", "KeyError: 'row 17' at 0x7f16 (my_task.py:12, in step)")
    ('task_error', "KeyError: 'row #' at # (my_task.py:#, in step)")
    """
    return stop_reason, re.sub(r"0x[0-9a-f]+|\d+", "#", error)


class FaultLog:
    """Appends to faults.jsonl. The file is made with its first line."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._written: os.stat_result | None = None
        """The file after the newest line; None before the first."""

    def write(self, faults: Sequence[FaultRecord]) -> None:
        """Append the records in one piece. Raises VlmrlError where the file cannot be written."""
        if not faults:
            return
        lines = b"".join(_line(fault) for fault in faults)
        with disk_errors(self._path), self._path.open("ab") as file:
            start = file.tell()
            try:
                file.write(lines)
                file.flush()
                self._written = os.fstat(file.fileno())
            except OSError:  # the disk is full: leave no half-written line
                os.ftruncate(file.fileno(), start)
                raise

    def cut_back(self, *, supervised_steps: int, step: int) -> None:
        """Remove what a run repeats that continues after so many supervised steps and after RL step `step` (−1: before
        the first evaluation), and a half-written last line. Raises VlmrlError."""
        if not self._path.exists():
            return
        with disk_errors(self._path):
            kept = [
                fault
                for fault in read_faults(self._path)
                if fault["step"] <= (supervised_steps if fault["phase"] == "supervised" else step)
            ]
            if kept:
                write_bytes_atomically(self._path, b"".join(map(_line, kept)))
            else:
                self._path.unlink()

    def check_in_place(self) -> None:
        """Raise VlmrlError where the file was removed, replaced or changed since the newest line was written."""
        if self._written is not None:
            check_in_place(self._path, self._written, self._written.st_size)

    def flush(self) -> None:
        """Wait until every line is on the disk."""
        if self._path.exists():
            with disk_errors(self._path), self._path.open("rb") as file:
                os.fsync(file.fileno())


def read_faults(path: Path, warn: Callable[[str], None] = log.warning) -> list[FaultRecord]:
    """Read faults.jsonl. A damaged line is skipped; `warn` is called with a sentence about it. Raises OSError."""
    return [fault for _, _, fault in read_lines(path, _is_fault, warn)] if path.exists() else []


def _is_fault(content: Any) -> bool:
    return (
        isinstance(content, dict)
        and content.keys() >= FaultRecord.__required_keys__
        and type(content["step"]) is int
        and all(isinstance(content[key], str) for key in ("phase", "rollout_id", "stop_reason", "error"))
    )


def _line(fault: FaultRecord) -> bytes:
    # Texts that a fence made are safe already; those of an engine's error may not be.
    safe = {key: safe_text(value) if isinstance(value, str) else value for key, value in fault.items()}
    return orjson.dumps(safe, option=orjson.OPT_APPEND_NEWLINE)
