"""Files of one JSON object per event, each of which belongs to a step: faults.jsonl and bad_rows.jsonl.

The file is made with its first line. A resumed run first removes the lines of the steps that it repeats, so a run that
was killed and resumed has the same lines as one that was not.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, Literal, TypeAlias, TypeVar, cast

import orjson

from vlmrl.errors import safe_text
from vlmrl.record.files import disk_errors, write_bytes_atomically
from vlmrl.record.in_place import check_in_place

Phase: TypeAlias = Literal["supervised", "eval", "rl"]
"""What the step of an event counts: supervised steps ("supervised"), RL steps ("rl"), or the RL step after which was
evaluated ("eval")."""

R = TypeVar("R")
"""The record of one line: a dictionary with at least `step` and `phase`."""


class StepLog(Generic[R]):
    """Appends to such a file."""

    def __init__(self, path: Path, read: Callable[[Path], Sequence[R]]) -> None:
        self._path = path
        self._read = read
        self._written: os.stat_result | None = None
        """The file after the newest line; None before the first."""

    def write(self, records: Sequence[R]) -> None:
        """Append the records in one piece. Raises VlmrlError where the file cannot be written."""
        if not records:
            return
        lines = b"".join(map(_line, records))
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
                record
                for record in self._read(self._path)
                if _fields(record)["step"] <= (supervised_steps if _fields(record)["phase"] == "supervised" else step)
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


def _fields(record: object) -> dict[str, Any]:
    return cast("dict[str, Any]", record)


def _line(record: object) -> bytes:
    # Texts that a fence made are safe already; those of an engine's error may not be.
    safe = {key: safe_text(value) if isinstance(value, str) else value for key, value in _fields(record).items()}
    return orjson.dumps(safe, option=orjson.OPT_APPEND_NEWLINE)
