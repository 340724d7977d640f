"""Evaluation sets among the metrics, and bad rows by reason, as the page shows them."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlmrl.monitor.report.tables import MAX_TEXT, SHOWN_REASONS, SHOWN_ROWS, bad_rows, named_sets
from vlmrl.record.bad_rows import BadRowLog, BadRowRecord
from vlmrl.record.splits import RESERVED


def test_sets_are_told_from_other_keys_of_an_evaluation() -> None:
    keys = [
        "step",
        "eval/reward",
        "eval/reward_greedy",
        "eval/reward/math",
        "eval/task/reward",
        "eval/by_task/a/reward",
    ]
    keys += [f"eval/{name}/reward" for name in RESERVED]
    assert named_sets([*keys, "eval/ood/reward/math", "eval/ood/task/pass@2x"]) == []
    (found,) = named_sets(["eval/o.o-d/maj@8", "eval/o.o-d/reward", "eval/o.o-d/reward_se", "eval/o.o-d/by/a/b/c/<x>"])
    assert found == {
        "name": "o.o-d",
        "scores": {"maj@8": "eval/o.o-d/maj@8", "reward": "eval/o.o-d/reward"},
        "by": [["a/b/c", [["<x>", "eval/o.o-d/by/a/b/c/<x>"]]]],
    }


@pytest.mark.parametrize("value", ["", "10", "(other)", "a∕b", "two\u2028lines", "reward"])
def test_values_of_a_column_keep_their_text_and_order(value: str) -> None:
    (found,) = named_sets([f"eval/a/by/column/{each}" for each in ("z", value, "0")])
    assert [pair[0] for pair in found["by"][0][1]] == ["z", value, "0"]


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
