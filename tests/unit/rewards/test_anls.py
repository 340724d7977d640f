"""The similarity of DocVQA, on a table from the paper's formula that was written before the function."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.reward_cases import attempt, attempt_of, cases
from vlmrl.config.reward import AnlsTerm
from vlmrl.rewards.anls import edit_distance, score_anls


def test_table() -> None:
    for case in cases("anls"):
        assert score_anls(AnlsTerm(), attempt_of(case)) == pytest.approx(case["expected"], abs=1e-8), case


def slow_distance(first: str, second: str) -> int:
    """The textbook table, cell by cell."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        above, row = row, [i]
        for j, b in enumerate(second, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (a != b)))
    return row[-1]


@given(st.text("abc😀", max_size=12), st.text("abc😀", max_size=12))
def test_distance_equals_the_textbook_table(first: str, second: str) -> None:
    assert edit_distance(first, second) == slow_distance(first, second)


def test_threshold() -> None:
    for threshold, expected in ((0.5, 0.75), (0.26, 0.75), (0.25, 0.0), (1.0, 0.75)):
        assert score_anls(AnlsTerm(threshold=threshold), attempt("abcd", "abce")) == expected


def test_no_answer_is_wrong() -> None:
    assert score_anls(AnlsTerm(), attempt("x", None)) == 0.0


def test_a_long_answer_to_a_short_reference_is_not_compared() -> None:
    began = time.process_time()
    assert score_anls(AnlsTerm(), attempt("x" * 1000, "x" * 1_000_000)) == 0.0
    assert time.process_time() - began < 1
