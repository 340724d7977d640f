"""pass_rates.json: how many sampled answers to each problem passed. mode=eval writes it, `task.curriculum` reads it.

    {"problems": {"train.parquet:417:9f31c2aa": {"passed": 3, "samples": 8}, …}}

A problem is named by its id. Faults count as samples that did not pass. Problems of all sets of an evaluation stand in
one table; a problem that several sets ask has the sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from vlmrl.errors import ConfigError
from vlmrl.record.files import disk_errors, write_bytes_atomically

PASS_RATES = "pass_rates.json"
"""The name of the file."""


@dataclass(frozen=True)
class PassRate:
    """How often the sampled answers to one problem passed."""

    passed: int
    samples: int


def write_pass_rates(path: Path, rates: Mapping[str, PassRate]) -> None:
    """Write the file. Raises VlmrlError."""
    problems = {id: {"passed": rate.passed, "samples": rate.samples} for id, rate in rates.items()}
    content = orjson.dumps({"problems": problems}, option=orjson.OPT_INDENT_2)
    with disk_errors(path):
        write_bytes_atomically(path, content)


def read_pass_rates(path: Path) -> dict[str, PassRate]:
    """Read the file, or the file of that name in a folder. Raises ConfigError where there is none, or another kind of
    file."""
    path = path / PASS_RATES if path.is_dir() else path
    try:
        content = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise ConfigError(
            f"{path} holds no pass rates ({error}), so no problem has a difficulty: name a file or folder that "
            "mode=eval wrote"
        ) from error
    problems = content.get("problems") if isinstance(content, dict) else None
    if not isinstance(problems, dict) or not all(map(_is_rate, problems.values())):
        raise ConfigError(
            f"{path} is no table of pass rates, so no problem has a difficulty: name a file or folder that mode=eval "
            "wrote"
        )
    return {id: PassRate(rate["passed"], rate["samples"]) for id, rate in problems.items()}


def _is_rate(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    passed, samples = value.get("passed"), value.get("samples")
    return type(passed) is int and type(samples) is int and 0 <= passed <= samples and samples > 0
