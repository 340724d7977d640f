"""The reward of numbers, on a table that was written by hand before the function."""

import time
from typing import Any

import numpy as np
import pytest

from support.reward_cases import attempt, attempt_of, cases
from vlmrl.config.reward import NumberTerm, PercentSign, UnitRule
from vlmrl.rewards.number import quantities, score_number


def term(options: dict[str, Any]) -> NumberTerm:
    enums: dict[str, Any] = {"percent": PercentSign, "units": UnitRule}
    return NumberTerm(**{name: enums.get(name, float)(value) for name, value in options.items()})


def test_table() -> None:
    wrong = [
        (case["reference"], case["answer"], case.get("options"), case["expected"], value)
        for case in cases("number")
        if (value := score_number(term(case.get("options", {})), attempt_of(case))) != case["expected"]
    ]
    assert not wrong, f"{len(wrong)} cases, reference, answer, options, expected, found:\n" + "\n".join(map(str, wrong))


def test_no_answer_is_wrong() -> None:
    assert score_number(NumberTerm(), attempt("7", None)) == 0.0


def test_references_of_other_types() -> None:
    for reference in (np.float32(0.1), np.int64(7), np.float64(0.1)):
        assert score_number(NumberTerm(), attempt(reference, f"It is {reference:.1f}.")) == 1.0


LONG = [
    "1" * 200_000, "1," * 100_000, "1 " * 100_000, "1/" * 100_000, "-" * 200_000, "one " * 50_000, "$" * 200_000,
    "1,234" * 40_000, r"\frac{1}{" * 20_000, "9^" * 100_000, "one hundred and " * 10_000, " " * 200_000,
    "1 " + " " * 200_000, "×" * 100_000, r"\text{" * 40_000, "$1" * 50_000, "1.234." * 40_000, "1" + "⁰" * 100_000,
    "½" * 100_000,
]  # fmt: skip


@pytest.mark.parametrize("text", LONG)
def test_long_answers_are_read_in_a_moment(text: str) -> None:
    began = time.process_time()
    score_number(NumberTerm(), attempt("7", text))
    assert time.process_time() - began < 2


def test_a_long_answer_is_read_from_its_end() -> None:
    assert score_number(NumberTerm(), attempt("7", "8 " * 100_000 + "so it is 7")) == 1.0


def test_numbers_of_a_sentence() -> None:
    found = quantities("A 5 ft 3 in table for $1,200, 45% off")
    assert [(each.value, each.unit, each.is_percent) for each in found] == [
        (5, "ft", False), (3, "in", False), (1200, "$", False), (45, "", True)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("reference", "answer", "expected"),
    [
        ("5, 6", "5,6", 1.0),
        ("5,6", "5, 6", 1.0),
        ("5,6", "5.6", 1.0),
        ("5,6", "6", 0.0),
        ("5, 6", "6,5", 0.0),
        ("6", "5,6", 0.0),
        ("5 and 6", "5,6", 1.0),
        ("1,200", "1200", 1.0),
        ("200", "1,200", 0.0),
    ],
)
def test_a_comma_without_a_space_may_separate(reference: str, answer: str, expected: float) -> None:
    assert score_number(NumberTerm(), attempt(reference, answer)) == expected
