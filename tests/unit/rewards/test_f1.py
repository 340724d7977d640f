"""The F1 score of SQuAD, on a table from the rules of its evaluation script that was written before the function."""

from __future__ import annotations

import pytest

from support.reward_cases import attempt, attempt_of, cases
from vlmrl.config.reward import F1Term
from vlmrl.rewards.f1 import score_f1


def test_table() -> None:
    for case in cases("f1"):
        assert score_f1(F1Term(), attempt_of(case)) == pytest.approx(case["expected"], abs=1e-8), case


def test_no_answer_is_wrong() -> None:
    assert score_f1(F1Term(), attempt("x", None)) == 0.0
