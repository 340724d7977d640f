"""faults.jsonl: what the user's code or data did wrong, one JSON object per fault, in the order in which it happened.

    {"step": 3, "phase": "rl", "rollout_id": "train/000003/01/00", "problem_id": "row 9", "split": "train",
     "problem_index": 9, "stop_reason": "task_error", "error": "step() raised KeyError: …", "traceback": "…"}

The file is absent while nothing went wrong. A resumed run first removes the lines of the steps that it repeats, so a
run that was killed and resumed has the same lines as one that was not. `mode=faults` shows the file.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypedDict

from vlmrl.record.lines import read_lines
from vlmrl.record.step_log import Phase, StepLog
from vlmrl.types import Rollout

log = logging.getLogger(__name__)

FaultPhase: TypeAlias = Phase


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


class FaultLog(StepLog[FaultRecord]):
    """Appends to faults.jsonl."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, read_faults)


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
