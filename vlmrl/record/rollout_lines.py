"""Read rollouts/*.jsonl of runs before 0.1.0, one JSON object per rollout. Such runs can be reported, compared,
replayed and exported; no run writes such a file any more."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson

from vlmrl.record.files import open_regular
from vlmrl.record.rollout_check import is_rollout

ROLLOUT_ID = re.compile(rb'\{"rollout_id":"([^"\\]*)"')
"""The start of a line."""


def read_lines(
    path: Path, wanted: Callable[[str], bool], damaged: Callable[[str, str], None]
) -> Iterator[dict[str, Any]]:
    """The records of the wanted rollouts of a file, each with its prompt tokens from `prompt_offset` on. Other lines
    are skipped without parsing.

    `damaged` is called with the place and the reason of each line that is no rollout; it is skipped. Raises OSError
    where there is no such regular file.
    """
    with open_regular(path) as file:
        for number, line in enumerate(file, 1):
            named = ROLLOUT_ID.match(line)
            if named and not wanted(named[1].decode(errors="replace")):
                continue
            try:
                record = orjson.loads(line)
            except orjson.JSONDecodeError as error:
                damaged(f"line {number} of {path}", str(error))
                continue
            if is_rollout(record):
                yield _completed(record)
            else:
                damaged(f"line {number} of {path}", "no run wrote it")


def _completed(record: dict[str, Any]) -> dict[str, Any]:
    """The record with the keys that later versions record."""
    for turn in record["turns"]:
        turn.setdefault("starts_over", False)
        turn.setdefault("tools", [])
        turn.setdefault("stop", None)
        turn.setdefault("sampling", None)
        turn.setdefault("support_sizes", None)
        turn.setdefault("support_ids", None)
        turn.setdefault("trainer_logprobs", None)
        turn.setdefault("entropies", None)
    return {
        "filtered": [],
        "task": "",
        "rewards": {},
        "reference": None,
        "stdout": None,
        "stderr": None,
        "videos": {},
        **record,
    }
