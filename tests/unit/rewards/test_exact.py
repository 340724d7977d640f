"""Compare an answer with the reference, text by text."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmrl.config.reward import ExactTerm
from vlmrl.rewards.base import Attempt, RewardError
from vlmrl.rewards.exact import exact


def value(answer: str | None, reference: Any, **settings: Any) -> float | None:
    attempt = Attempt("train/000001/00/00", "row 0", (), answer or "", answer, reference, {}, ())
    return exact(ExactTerm(**settings))(attempt)


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("Paris", "Paris", 1.0),
        (" Paris\n", "Paris", 1.0),
        ("New\n York", "New York", 1.0),
        ("Paris", " Paris ", 1.0),
        ("paris", "Paris", 0.0),
        ("Paris.", "Paris", 0.0),
        ("in Paris", "Paris", 0.0),
        ("1 000", "1000", 0.0),
        ("caf\u00e9", "cafe\u0301", 1.0),
        ("", "Paris", 0.0),
        (None, "Paris", 0.0),
        ("", "", 1.0),
        (None, "", 0.0),
        ("Paris", None, None),
        ("7", 7, 1.0),
        ("7", 7.0, 1.0),
        ("7.0", 7.0, 1.0),
        ("7", "7.0", 0.0),
        ("0.5", 0.5, 1.0),
        ("true", True, 1.0),
        ("True", True, 1.0),
        ("1", True, 0.0),
        ("cat", ["cat", "a cat"], 1.0),
        ("a cat", ("cat", "a cat"), 1.0),
        ("dog", ["cat", "a cat"], 0.0),
        ("7", ["seven", 7], 1.0),
        ("None", [None, "x"], 0.0),
        ("x", [], 0.0),
        ("inf", float("inf"), 1.0),
    ],
)
def test_value(answer: str | None, reference: Any, expected: float | None) -> None:
    assert value(answer, reference) == expected


@pytest.mark.parametrize(
    ("setting", "answer", "reference"),
    [
        ("ignore_case", "pARIS", "Paris"),
        ("ignore_case", "STRASSE", "Straße"),
        ("ignore_spaces", "1 000", "1000"),
        ("ignore_spaces", "1000", "1\u00a0000"),
        ("ignore_punctuation", "Paris.", "Paris"),
        ("ignore_punctuation", "¿Paris?", "Paris"),
        ("ignore_punctuation", "1,000", "1000"),
    ],
)
def test_a_setting_makes_two_texts_equal(setting: str, answer: str, reference: str) -> None:
    """And without it they differ."""
    assert value(answer, reference) == 0.0
    assert value(answer, reference, **{setting: True}) == 1.0


@pytest.mark.parametrize("reference", [{"target": "Paris"}, b"Paris", object(), [["Paris"], {"a": 1}]])
def test_a_reference_that_is_no_text_is_a_fault(reference: Any) -> None:
    with pytest.raises(RewardError, match=r"the reference is .* and no text, so no answer can equal it"):
        value("Paris", reference)


@given(st.text(max_size=30), st.booleans(), st.booleans(), st.booleans())
def test_a_text_equals_itself(text: str, case: bool, spaces: bool, punctuation: bool) -> None:
    settings = {"ignore_case": case, "ignore_spaces": spaces, "ignore_punctuation": punctuation}
    assert value(text, text, **settings) == 1.0
    assert value(f"  {text}\n", text, **settings) == 1.0
