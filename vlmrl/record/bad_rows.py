"""bad_rows.jsonl: rows of the data that cannot be used, one JSON object per row, in the order in which they were found.

    {"step": 3, "phase": "rl", "split": "train", "index": 9, "source": "train.parquet", "row": 417,
     "reason": "the column 'answer' is empty"}

The file is absent while every row can be used. A row is listed once, however often it is drawn. `mode=faults` shows the
file.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypedDict

from vlmrl.record.faults import fault_kind
from vlmrl.record.lines import read_lines
from vlmrl.record.step_log import Phase, StepLog

log = logging.getLogger(__name__)


class BadRowRecord(TypedDict):
    """One line of bad_rows.jsonl."""

    step: int
    """The supervised step, the RL step, or the step after which was evaluated, for which the row was drawn first."""
    phase: Phase
    split: str
    """`train` or `eval`: with `index` the arguments of the task's `problem`."""
    index: int
    source: str
    """The file or the data set; "" where the task does not say."""
    row: int | None
    """The row in it, counted from 0; None where the task does not say."""
    reason: str


class BadRowLog(StepLog[BadRowRecord]):
    """Appends to bad_rows.jsonl."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, read_bad_rows)


def place_of(record: BadRowRecord) -> str:
    """Where the row stands: its file and number, or what `Task.problem` was called with.

    >>> place_of(dict(step=1, phase="rl", split="train", index=9, source="a.csv", row=4, reason=""))
    'a.csv row 4'
    """
    named = " ".join(filter(None, (record["source"], None if record["row"] is None else f"row {record['row']}")))
    return named or f'problem("{record["split"]}", {record["index"]})'


def kinds_of_bad_rows(rows: Iterable[BadRowRecord]) -> list[list[BadRowRecord]]:
    """Rows with the same reason together, the most frequent reason first. Numbers in a reason are ignored: they differ
    from row to row."""
    kinds: dict[str, list[BadRowRecord]] = {}
    for row in rows:
        kinds.setdefault(fault_kind("", row["reason"])[1], []).append(row)
    return sorted(kinds.values(), key=len, reverse=True)


def read_bad_rows(path: Path, warn: Callable[[str], None] = log.warning) -> list[BadRowRecord]:
    """Read bad_rows.jsonl. A damaged line is skipped; `warn` is called with a sentence about it. Raises OSError."""
    return [record for _, _, record in read_lines(path, _is_bad_row, warn)] if path.exists() else []


def _is_bad_row(content: Any) -> bool:
    return (
        isinstance(content, dict)
        and content.keys() >= BadRowRecord.__required_keys__
        and type(content["step"]) is int
        and type(content["index"]) is int
        and (content["row"] is None or type(content["row"]) is int)
        and all(isinstance(content[key], str) for key in ("phase", "split", "source", "reason"))
    )
