"""Evaluation sets among the metrics, as the page shows them."""

from __future__ import annotations

import pytest

from vlmrl.monitor.report.named_sets import named_sets
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
