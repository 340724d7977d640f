"""Bad rows by reason, as the page shows them."""

from __future__ import annotations

from pathlib import Path

from vlmrl.monitor.report.bad_rows import MAX_TEXT, SHOWN_REASONS, SHOWN_ROWS, bad_rows
from vlmrl.record.bad_rows import BadRowLog, BadRowRecord


def row(index: int, reason: str) -> BadRowRecord:
    return BadRowRecord(step=index, phase="rl", split="train", index=index, source="a.csv", row=index, reason=reason)


def test_bad_rows_are_grouped_by_reason(tmp_path: Path) -> None:
    path = tmp_path / "bad_rows.jsonl"
    assert bad_rows(path) == {"count": 0, "reasons": 0, "shown": []}
    rows = [row(0, "x" * 10 * MAX_TEXT), *(row(index, f"image {index} is broken") for index in range(1, 8))]
    rows += [row(9, "empty " + "?" * kind) for kind in range(SHOWN_REASONS)]
    BadRowLog(path).write(rows)
    found = bad_rows(path)
    assert (found["count"], found["reasons"], len(found["shown"])) == (28, 22, SHOWN_REASONS)
    first, second = found["shown"][:2]
    assert (first["reason"], first["count"]) == ("image 1 is broken", 7)
    assert first["rows"] == [[f"a.csv row {index}", index, "rl"] for index in range(1, SHOWN_ROWS + 1)]
    assert len(second["reason"]) == MAX_TEXT
