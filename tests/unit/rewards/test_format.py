"""Check the form of a completion."""

from __future__ import annotations

import time
from typing import Any

import pytest

from vlmrl.config.reward import FormatPreset, FormatTerm
from vlmrl.errors import ConfigError
from vlmrl.rewards.base import Attempt, RewardError
from vlmrl.rewards.format import format_of


def value(completion: str, **settings: Any) -> float | None:
    attempt = Attempt("train/000001/00/00", "row 0", (), completion, None, None, {}, ())
    return format_of(FormatTerm(**settings), "reward.terms.format")(attempt)


FORMS: list[tuple[str, set[str]]] = [
    ("<think>a</think><answer>b</answer>", {"think", "think_answer"}),
    ("<think>\na\nb\n</think>\n\n<answer>\nb\n</answer>\n", {"think", "think_answer"}),
    ("<think></think><answer></answer>", {"think", "think_answer"}),
    ("<think>a</think> b", {"think"}),
    ("<think>a</think>", set()),
    ("<think>a", set()),
    ("a</think> b", set()),
    ("<think>a</think><think>b</think> c", set()),
    ("<think><think>a</think> b", set()),
    ("<answer>b</answer>", set()),
    ("well: <think>a</think><answer>b</answer>", set()),
    ("<think>a</think><answer>b</answer> c", {"think"}),
    ("<think>a</think> so <answer>b</answer>", {"think"}),
    ("<think>a</think><answer>b</answer><answer>c</answer>", {"think"}),
    ("<think><answer>b</answer></think>", set()),
    ("<think>a <answer> </think><answer>b</answer>", {"think"}),
    ("<answer>b</answer><think>a</think>", set()),
    ("<Think>a</Think><Answer>b</Answer>", set()),
    (r"<think>a</think> \boxed{5}", {"think", "boxed", "think_boxed"}),
    (r"<think>a</think><answer>\boxed{\frac{1}{2}}</answer>", {"think", "think_answer", "boxed", "think_boxed"}),
    (r"<think>\boxed{5}</think> 5", {"think", "boxed"}),
    (r"\boxed{5}", {"boxed"}),
    (r"It is \boxed{5}.", {"boxed"}),
    (r"\boxed{5", set()),
    ("5", set()),
    ("", set()),
]
"""Completion → the presets whose form it has."""


@pytest.mark.parametrize(("completion", "forms"), FORMS)
def test_presets(completion: str, forms: set[str]) -> None:
    for preset in FormatPreset:
        assert value(completion, presets=[preset]) == float(preset.value in forms), preset


def test_without_a_setting_it_is_think_answer() -> None:
    assert value("<think>a</think><answer>b</answer>") == 1.0
    assert value("<think>a</think> b") == 0.0


@pytest.mark.parametrize(
    ("pattern", "completion", "expected"),
    [
        ("Answer:", "so\nAnswer: 5", 1.0),
        ("^Answer:", "so\nAnswer: 5", 0.0),
        ("^Answer: .*$", " Answer: 5\nor 6 ", 1.0),
        (r"<a>.*</a>", "<a>1\n2</a>", 1.0),
        (r"\d+", "five", 0.0),
        ("", "", 1.0),
    ],
)
def test_pattern(pattern: str, completion: str, expected: float) -> None:
    assert value(completion, pattern=pattern) == expected


def test_a_completion_must_have_all_forms() -> None:
    settings = {"presets": [FormatPreset.think, FormatPreset.boxed], "pattern": r"units"}
    assert value(r"<think>a</think> \boxed{5} units", **settings) == 1.0
    assert value(r"<think>a</think> \boxed{5}", **settings) == 0.0
    assert value(r"<think>a</think> 5 units", **settings) == 0.0
    assert value(r"\boxed{5} units", **settings) == 0.0


def test_a_pattern_that_cannot_be_used() -> None:
    with pytest.raises(ConfigError, match=r"^reward\.terms\.format\.pattern=\(a is not a regular expression"):
        value("a", pattern="(a")
    with pytest.raises(RewardError, match=r"^reward\.terms\.format\.pattern took longer than 1 s"):
        value("a" * 79 + "!", pattern="^(a|aa)+$")


@pytest.mark.parametrize("piece", ["<think>", "</think>", "<think></think>", "<answer>", "\\boxed{", "<"])
def test_long_completions_take_no_quadratic_time(piece: str) -> None:
    started = time.process_time()
    value(piece * 8000, presets=list(FormatPreset))
    for preset in FormatPreset:
        value("<think>" + piece * 8000, presets=[preset])
    assert time.process_time() - started < 2
