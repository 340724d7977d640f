"""metrics.jsonl: one JSON object per optimizer step, in ascending order of `step`.

    {"step":0,"eval/reward":0.0,"eval/reward_greedy":0.0,"time/elapsed":9.1}         before the first step
    {"step":1,"policy_version":1,"reward/mean":0.03,…,"time/elapsed":9.6}
    {"step":10,…,"eval/reward":0.11,"eval/reward_greedy":0.13,…}                     a step that was evaluated

Numbers are finite or null. `eval/reward` is held-out reward under sampling, `eval/reward_greedy` under greedy
decoding; both stand on the line of the step after which they were measured.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import orjson

from vlmrl.errors import VlmrlError
from vlmrl.record.files import disk_errors

Record: TypeAlias = dict[str, Any]
"""One line: floats (None where not finite) by key; `step` an int."""

EVAL_SAMPLED = "eval/reward"
EVAL_GREEDY = "eval/reward_greedy"
ELAPSED = "time/elapsed"
"""Wall-clock seconds of the run so far, the segments before a resume included."""
ZERO_ADVANTAGE = "groups/zero_advantage"
"""Share of the step's groups in [0, 1] in which no turn has an advantage: they teach nothing."""

STEP_KEYS = (
    "step",
    "policy_version",
    "reward/mean",
    "reward/std",
    "loss",
    "grad_norm",
    "entropy",
    "mismatch_kl/mean",
    "mismatch_kl/max",
    "staleness/mean",
    "staleness/max",
    "rollouts/total",
    "rollouts/dropped",
    "bridge_break_rate",
    "tokens/prompt",
    "tokens/completion",
    "tokens/trained",
    "tokens/packed",
    "images/distinct",
    "wire/bytes_sent",
    "time/step",
    "time/rollout",
    "time/train",
    "time/sync",
    "throughput/tokens_per_s",
    "memory/peak_bytes",
)
"""Keys that every optimizer step must have; an evaluation adds `eval/reward`."""


def missing_keys(record: Mapping[str, Any]) -> list[str]:
    """Keys that a line of metrics.jsonl lacks. Step 0 is the evaluation before the first step.

    >>> missing_keys({"step": 0})
    ['eval/reward']
    >>> missing_keys(dict.fromkeys(STEP_KEYS, 1.0))
    []
    """
    required = ("step", EVAL_SAMPLED) if record.get("step") == 0 else STEP_KEYS
    return [key for key in required if key not in record]


class MetricsLog:
    """Appends lines; each reaches the file whole, in one write."""

    def __init__(self, path: Path) -> None:
        """Open or make the file. Raises VlmrlError where a complete line in it is no JSON object."""
        self.path = path
        with disk_errors(path):
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        self.last: Record | None = None
        """The newest line."""
        self._last_start = 0
        self._end = 0
        for start, end, record in _lines(path):
            self.last, self._last_start, self._end = record, start, end
        with disk_errors(path):
            os.ftruncate(self._fd, self._end)  # a half-written last line

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a line; a second record of the newest step (its evaluation) is merged into that line."""
        step = record["step"]
        if self.last is not None and step == self.last["step"]:
            start, merged = self._last_start, {**self.last, **record}
        else:
            assert self.last is None or step > self.last["step"], f"step {step} after step {self.last['step']}"
            start, merged = self._end, dict(record)
        line = orjson.dumps(merged, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE)
        with disk_errors(self.path):
            written = os.pwrite(self._fd, line, start)
            if written < len(line):  # the disk is full: say it here rather than leave half a line
                os.ftruncate(self._fd, start)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.ftruncate(self._fd, start + len(line))
        self.last, self._last_start, self._end = orjson.loads(line), start, start + len(line)

    def truncate_after(self, step: int) -> None:
        """Drop the lines of later steps than `step`: what a resumed run does again."""
        self.last, self._last_start, self._end = None, 0, 0
        for start, end, record in _lines(self.path):
            if record["step"] > step:
                break
            self.last, self._last_start, self._end = record, start, end
        with disk_errors(self.path):
            os.ftruncate(self._fd, self._end)

    def flush(self) -> None:
        """Return when every line is on the disk."""
        with disk_errors(self.path):
            os.fsync(self._fd)

    def close(self) -> None:
        os.close(self._fd)


def read_metrics(path: Path) -> list[Record]:
    """The lines of a metrics.jsonl, without a half-written last one. Raises VlmrlError, OSError."""
    return [record for _, _, record in _lines(path)]


def _lines(path: Path) -> Iterator[tuple[int, int, Record]]:
    """(first byte, byte after the newline, record) of each complete line."""
    start = 0
    for line in path.read_bytes().splitlines(keepends=True):
        if not line.endswith(b"\n"):
            return
        try:
            record = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise VlmrlError(f"{path} has a line that is no JSON, at byte {start}: it was edited or damaged") from error
        yield start, start + len(line), record
        start += len(line)
