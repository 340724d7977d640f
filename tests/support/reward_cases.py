"""The tables of cases for the built-in rewards, and the attempts that they are tried on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vlmrl.rewards.base import Attempt, SeenImage

TABLES = Path(__file__).parents[1] / "unit/rewards/cases"


def cases(table: str) -> list[dict[str, Any]]:
    """The rows of a table, which has at least 200 of them."""
    rows = [json.loads(line) for line in (TABLES / f"{table}.jsonl").read_text("utf-8").splitlines()]
    assert len(rows) >= 200
    return rows


def attempt(
    reference: Any, answer: str | None, images: tuple[SeenImage, ...] = (), completion: str | None = None
) -> Attempt:
    """An attempt at a problem without a prompt."""
    whole = completion if completion is not None else answer or ""
    return Attempt("train/000001/00/00", "rows:0", (), whole, answer, reference, {}, images)


def attempt_of(case: dict[str, Any]) -> Attempt:
    """The attempt that a row of a table describes."""
    images = (SeenImage(*case["image"]),) if "image" in case else ()
    return attempt(case["reference"], case["answer"], images)
