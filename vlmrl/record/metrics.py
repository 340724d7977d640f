"""metrics.jsonl: one JSON object per optimizer step, in ascending order of `step`.

    {"step":0,"eval/reward":0.0,"eval/reward_greedy":0.0,"time/elapsed":9.1}         before the first step
    {"step":1,"policy_version":1,"reward/mean":0.03,…,"time/elapsed":9.6}
    {"step":10,…,"eval/reward":0.11,"eval/reward_greedy":0.13,…}                     a step that was evaluated

Numbers are finite or null. An evaluation (`eval/…`) is on the line of the step after which it was made.
step_keys.py explains every key.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import orjson

from vlmrl.record.files import disk_errors, is_number
from vlmrl.record.in_place import check_in_place
from vlmrl.record.lines import read_lines

log = logging.getLogger(__name__)

Record: TypeAlias = dict[str, Any]
"""One line: floats (None where not finite) by key; `step` is an int."""

EVAL_SAMPLED = "eval/reward"
EVAL_GREEDY = "eval/reward_greedy"
DEMONSTRATION_LOSS = "eval/demonstration_loss"
PAIR_ACCURACY = "eval/dpo/accuracy"
ELAPSED = "time/elapsed"
ZERO_ADVANTAGE = "groups/zero_advantage"


class MetricsLog:
    """Appends lines to metrics.jsonl. Each line is written in one piece."""

    def __init__(self, path: Path, warn: Callable[[str], None] = log.warning) -> None:
        """Open or create the file. `warn` is called with a sentence about each damaged line. Raises VlmrlError."""
        self.path = path
        self._warn = warn
        with disk_errors(path):
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        self.last: Record | None = None
        """The newest line."""
        self._last_start = 0
        self._end = 0
        with disk_errors(path):
            for start, end, record in _lines(path, warn):
                self.last, self._last_start, self._end = record, start, end
            os.ftruncate(self._fd, self._end)  # remove a half-written last line

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a line. A second record of the newest step (its evaluation) is merged into the step's line."""
        step = record["step"]
        if self.last is not None and step == self.last["step"]:
            start, merged = self._last_start, {**self.last, **record}
        else:
            assert self.last is None or step > self.last["step"], f"step {step} after step {self.last['step']}"
            start, merged = self._end, dict(record)
        line = orjson.dumps(merged, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE)
        with disk_errors(self.path):
            written = os.pwrite(self._fd, line, start)
            if written < len(line):  # the disk is full: remove the half-written line and report it
                os.ftruncate(self._fd, start)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.ftruncate(self._fd, start + len(line))
        self.last, self._last_start, self._end = orjson.loads(line), start, start + len(line)

    def truncate_after(self, step: int) -> None:
        """Remove the lines of steps after `step`, which a resumed run repeats."""
        self.last, self._last_start, self._end = None, 0, 0
        for start, end, record in _lines(self.path, self._warn):
            if record["step"] > step:
                break
            self.last, self._last_start, self._end = record, start, end
        with disk_errors(self.path):
            os.ftruncate(self._fd, self._end)

    def check_in_place(self) -> None:
        """Raise VlmrlError where the file was removed, replaced or changed since the newest line was written."""
        check_in_place(self.path, os.fstat(self._fd), self._end)

    def flush(self) -> None:
        """Wait until every line is on the disk."""
        with disk_errors(self.path):
            os.fsync(self._fd)

    def close(self) -> None:
        os.close(self._fd)


def read_metrics(path: Path, warn: Callable[[str], None] = log.warning) -> list[Record]:
    """Read the lines of metrics.jsonl, except a half-written last one. A damaged line is skipped; `warn` is called with
    a sentence about it. Raises OSError."""
    return [record for _, _, record in _lines(path, warn)]


def _lines(path: Path, warn: Callable[[str], None]) -> Iterator[tuple[int, int, Record]]:
    """Yield (first byte, byte after the newline, record) of each line of an ascending step."""
    newest = -1

    def is_record(content: Any) -> bool:
        if not isinstance(content, dict) or not all(map(is_number, content.values())):
            return False
        step = content.get("step")
        return isinstance(step, int) and step > newest

    for start, end, record in read_lines(path, is_record, warn):
        newest = record["step"]
        yield start, end, record
