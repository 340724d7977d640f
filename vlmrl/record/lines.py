"""Read the lines of a .jsonl file of a run: complete lines, in order, without the damaged ones.

A run appends whole lines. A killed run may leave a half-written last line, which readers leave out. A complete line
that is not what a run writes (a disk that failed, an editor) is skipped with a warning where only a display depends on
it, so that one bad line does not lose the run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson

from vlmrl.record.files import open_regular

log = logging.getLogger(__name__)


def read_lines(
    path: Path, is_valid: Callable[[Any], bool], warn: Callable[[str], None] = log.warning
) -> Iterator[tuple[int, int, Any]]:
    """Yield (first byte, byte after the newline, object) of each complete line that `is_valid` accepts.

    `warn` is called with a sentence about each other line. Raises OSError.
    """
    end = 0
    with open_regular(path) as file:
        for number, line in enumerate(file, 1):
            start, end = end, end + len(line)
            if not line.endswith(b"\n"):
                return
            try:
                content = orjson.loads(line)
                reason = "" if is_valid(content) else "no run wrote it"
            except orjson.JSONDecodeError:
                reason = "it is not JSON"
            if reason:
                warn(f"line {number} of {path} is damaged ({reason}) and is skipped")
            else:
                yield start, end, content
