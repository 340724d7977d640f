"""Score answers to multiple-choice questions. The values are those of tests/support/choice_cases.py."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.choice_cases import CASES, COLORS, PROMPTS, Case
from vlmrl.config.reward import ChoiceTerm
from vlmrl.rewards.base import Attempt, RewardError
from vlmrl.rewards.choice import choice, chosen_option, prompt_options
from vlmrl.types import Message


def attempt(answer: str | None, reference: Any, columns: Mapping[str, Any], prompt: str = "") -> Attempt:
    return Attempt(
        "train/000001/00/00", "row 0", (Message.of("user", prompt),), answer or "", answer, reference, columns, ()
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.reference}: {case.answer}"[:60])
def test_table(case: Case) -> None:
    columns = {} if case.options is None else {"options": list(case.options)}
    term = ChoiceTerm(first_index=case.first_index)
    assert choice(term)(attempt(case.answer, case.reference, columns)) == case.value


def test_the_table_is_long_enough() -> None:
    assert len(CASES) >= 200


@pytest.mark.parametrize(("prompt", "options"), PROMPTS)
def test_the_options_of_a_prompt(prompt: str, options: tuple[str, ...] | None) -> None:
    assert prompt_options(prompt) == options
    if options is not None:
        value = choice(ChoiceTerm())(attempt(options[1], "B", {}, prompt))
        assert value == 1.0, "its second option is the right one"


@pytest.mark.parametrize(
    "columns",
    [
        {"options": ["red", "blue"]},
        {"choices": ("red", "blue")},
        {"options": "['red', 'blue']"},
        {"options": {"B": "blue", "A": "red"}},
        {"options": ["A. red", "(B) blue"]},
        {"options": "A. red\nB. blue"},
        {"options": ["red", "blue", None]},
        {"A": "red", "B": "blue", "C": None, "D": None},
        {"options": None, "choices": ["red", "blue"]},
    ],
)
def test_the_options_of_a_row(columns: Mapping[str, Any]) -> None:
    """The forms in which public data sets hold options (A-OKVQA, ScienceQA, MMMU, MMBench)."""
    score = choice(ChoiceTerm())
    assert score(attempt("blue", "B", columns)) == 1.0
    assert score(attempt("red", "B", columns)) == 0.0
    assert score(attempt("C", "B", columns)) == 0.0


def test_a_column_of_another_name() -> None:
    score = choice(ChoiceTerm(options="candidates"))
    assert score(attempt("blue", 1, {"candidates": ["red", "blue"], "options": ["blue", "red"]})) == 1.0
    with pytest.raises(RewardError, match=r"options=candidates names no column of this row.*it has picture, answer"):
        score(attempt("blue", 1, {"picture": 1, "answer": 2}))


def test_a_row_without_a_reference_abstains() -> None:
    assert choice(ChoiceTerm())(attempt("B", None, {})) is None


def test_an_answer_that_was_not_found_is_wrong() -> None:
    assert choice(ChoiceTerm())(attempt(None, "B", {})) == 0.0


@pytest.mark.parametrize("reference", ["E", "purple", 4, -1, 1.5, "AC", {"answer": "A"}, ""])
def test_a_reference_that_names_no_option_is_a_fault(reference: Any) -> None:
    with pytest.raises(
        RewardError, match=r"names no option \(the options are \['red', 'blue', 'dark green', 'green'\]"
    ):
        choice(ChoiceTerm())(attempt("A", reference, {"options": list(COLORS)}))


@given(st.text(max_size=60) | st.text("ABCabc().:,* \nisorthenw", max_size=40))
def test_any_text_names_an_option_or_none(answer: str) -> None:
    for options in (COLORS, None):
        option = chosen_option(answer, options)
        assert option is None or 0 <= option < (4 if options else 26)


@given(st.sampled_from(COLORS), st.sampled_from(["{}", "The answer is {}.", "\\boxed{{{}}}", "I see\n{}", "So, {}"]))
def test_each_option_is_found_in_each_form(option: str, form: str) -> None:
    letter = "ABCD"[COLORS.index(option)]
    for text in (option, letter, f"({letter})", f"{letter}. {option}"):
        assert chosen_option(form.format(text), COLORS) == COLORS.index(option)


@pytest.mark.parametrize("piece", ["\\text{", "so ", "(B) ", "B. ", " ", "a b, ", "*", "answer is not ", "A\n"])
def test_long_answers_take_no_quadratic_time(piece: str) -> None:
    """A policy that repeats itself for 8,000 tokens must not stop the run."""
    started = time.process_time()
    chosen_option(piece * 8000, COLORS)
    prompt_options(piece * 1000)
    assert time.process_time() - started < 2
