"""What the page shows of a run's bad rows, as plain JSON: reasons with their number of rows and the first places."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlmrl.record.bad_rows import kinds_of_bad_rows, place_of, read_bad_rows

SHOWN_REASONS = 20
"""Reasons of bad rows on a page, the most frequent ones first."""
SHOWN_ROWS = 5
"""Bad rows that a page names for each reason."""
MAX_TEXT = 500
"""Characters of a reason or a place on the page: a row may hold a whole file."""


def bad_rows(path: Path) -> dict[str, Any]:
    """The rows of bad_rows.jsonl by reason: `{"count": rows, "reasons": number of reasons, "shown": [{"reason",
    "count", "rows": [[place, step, phase], …]}]}`. Raises OSError."""
    rows = read_bad_rows(path)
    kinds = kinds_of_bad_rows(rows)
    return {
        "count": len(rows),
        "reasons": len(kinds),
        "shown": [
            {
                "reason": _clipped(kind[0]["reason"]),
                "count": len(kind),
                "rows": [[_clipped(place_of(row)), row["step"], row["phase"]] for row in kind[:SHOWN_ROWS]],
            }
            for kind in kinds[:SHOWN_REASONS]
        ],
    }


def _clipped(text: str) -> str:
    return text if len(text) <= MAX_TEXT else f"{text[: MAX_TEXT - 1]}…"
