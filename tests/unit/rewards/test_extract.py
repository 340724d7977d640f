r"""Find the answer in a completion.

The cases are written by hand. Those of `boxed` include the ones in which Minerva's `last_boxed_only_string`
(hendrycks/math, verl) fails: braces that are escaped, and a last box that was cut.
"""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmrl.config.reward import ExtractConfig, Extraction
from vlmrl.errors import ConfigError
from vlmrl.rewards.base import RewardError
from vlmrl.rewards.extract import extractor, last_boxed, last_line, last_tagged

TEXTS = st.text(st.characters(codec="utf-8"), max_size=80)
"""Any text that a policy may sample."""
LATEX = st.text(r"\{}boxed 12ab$", max_size=60)
"""Texts that are full of braces and backslashes."""


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (r"\boxed{5}", "5"),
        (r"so $\boxed{5}$.", "5"),
        (r"\boxed{ 5 }", "5"),
        (r"\boxed {5}", "5"),
        (r"\\boxed{5}", "5"),
        (r"\\{ \boxed{5}", "5"),
        (r"\boxed{1} and then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\text{a{b}c}}", r"\text{a{b}c}"),
        (r"\boxed{\boxed{7}}", "7"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\left\{1\right.}", r"\left\{1\right."),
        ("\\boxed{a\nb}", "a\nb"),
        (r"\boxed{}", ""),
        (r"\fbox{5}", "5"),
        (r"\boxed{5} but \boxed{6", "5"),
        (r"\boxed{5", None),
        (r"\boxed 5", None),
        ("boxed{5}", None),
        ("5", None),
        ("", None),
    ],
)
def test_boxed(completion: str, answer: str | None) -> None:
    assert last_boxed(completion) == answer


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("<answer>B</answer>", "B"),
        ("<think>A?</think>\n<answer>\nB\n</answer>", "B"),
        ("<answer>A</answer><answer>B</answer>", "B"),
        ("<answer>A</answer> and </answer>", "A"),
        ("the <answer> tag: <answer>B</answer>", "B"),
        ("<answer>A</answer><answer>B", "A"),
        ("<answer></answer>", ""),
        ("<Answer>B</Answer>", None),
        ("</answer>B<answer>", None),
        ("B", None),
        ("", None),
    ],
)
def test_tag(completion: str, answer: str | None) -> None:
    assert last_tagged(completion, "answer") == answer


@pytest.mark.parametrize(
    ("completion", "answer"),
    [("5", "5"), ("a\n 5 \n \n", "5"), ("a\r\nb\r\n", "b"), ("a b", "a b"), ("", None), (" \n ", None)],
)
def test_last_line(completion: str, answer: str | None) -> None:
    assert last_line(completion) == answer


@pytest.mark.parametrize(
    ("pattern", "completion", "answer"),
    [
        (r"Answer: (\w+)", "Answer: A. Answer: B.", "B"),
        (r"\d+", "from 3 to 17", "17"),
        (r"is (\d+)|are (\d+)", "there are 4", "4"),
        (r"<a>(.*)</a>", "<a>two\nlines</a>", "two\nlines"),
        (r"Answer:(.*)", "Answer:", ""),
        (r"Answer: (\w+)", "B", None),
    ],
)
def test_regex(pattern: str, completion: str, answer: str | None) -> None:
    config = ExtractConfig(Extraction.regex, pattern=pattern)
    assert extractor(config, key="reward.extract")(completion) == answer


def test_a_pattern_that_would_search_for_minutes_costs_its_rollout() -> None:
    extract = extractor(ExtractConfig(Extraction.regex, pattern="(a|aa)+$"), key="reward.extract")
    started = time.process_time()
    with pytest.raises(RewardError, match=r"reward\.extract\.pattern took longer than 1 s on a completion of 80 char"):
        extract("a" * 79 + "!")
    assert time.process_time() - started < 10
    assert extract("aaa") == "a"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ExtractConfig(Extraction.regex), r"reward\.terms\.exact\.extract\.kind=regex has no pattern"),
        (ExtractConfig(Extraction.regex, pattern="(a"), r"extract\.pattern=\(a is not a regular expression"),
    ],
)
def test_a_pattern_that_cannot_be_used_is_refused(config: ExtractConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        extractor(config, key="reward.terms.exact.extract")


def test_a_term_may_differ_from_what_all_share() -> None:
    shared = ExtractConfig(Extraction.boxed)
    completion = "\\boxed{1} <answer>2</answer>\n3"
    assert extractor(ExtractConfig(), shared, key="x")(completion) == "1"
    assert extractor(ExtractConfig(Extraction.tag), shared, key="x")(completion) == "2"
    assert extractor(ExtractConfig(Extraction.last_line), shared, key="x")(completion) == "3"
    assert extractor(ExtractConfig(Extraction.whole), shared, key="x")(" all ") == "all"
    assert extractor(ExtractConfig(), ExtractConfig(), key="x")(" all ") == "all", "nothing is said: whole"


def test_the_error_of_a_shared_pattern_names_the_shared_key() -> None:
    with pytest.raises(ConfigError, match=r"^reward\.extract\.pattern=\("):
        extractor(ExtractConfig(), ExtractConfig(Extraction.regex, pattern="("), key="reward.terms.exact.extract")


# ── properties ──────────────────────────────────────────────────────────────────────────────────────────────


@given(before=TEXTS, answer=st.text("ab1 .,^_", max_size=20), after=st.text("ab1 .,\n", max_size=20))
def test_what_was_put_in_comes_out(before: str, answer: str, after: str) -> None:
    """For each way to state an answer, whatever stands before it; after it stands no other answer."""
    assert last_boxed(f"{before}\\boxed{{{answer}}}{after}") == answer.strip()
    assert last_tagged(f"{before}<answer>{answer}</answer>{after}", "answer") == answer.strip()
    config = ExtractConfig(Extraction.regex, pattern=r"%%([^%]*)%%")
    pieces = before.replace("%", ""), after.replace("%", "")
    assert extractor(config, key="x")(f"{pieces[0]}%%{answer}%%{pieces[1]}") == answer.strip()


@given(LATEX | TEXTS)
def test_any_text_has_an_answer_or_none(completion: str) -> None:
    """No completion raises, and an answer is a part of it without white space at its ends."""
    for kind in (Extraction.whole, Extraction.boxed, Extraction.tag, Extraction.last_line):
        answer = extractor(ExtractConfig(kind), key="x")(completion)
        assert answer is None or (answer == answer.strip() and answer in completion)


@given(LATEX)
def test_the_braces_of_a_box_are_balanced(completion: str) -> None:
    answer = last_boxed(completion)
    if answer is not None:
        plain = answer.replace("\\\\", "").replace("\\{", "").replace("\\}", "")
        assert plain.count("{") == plain.count("}")


@pytest.mark.parametrize("piece", ["\\boxed{", "<answer>", "</answer>", "{", "\n", "\\"])
def test_long_completions_take_no_quadratic_time(piece: str) -> None:
    """A policy that repeats itself for 8,000 tokens must not stop the run."""
    completion, started = piece * 8000, time.process_time()
    for kind in (Extraction.whole, Extraction.boxed, Extraction.tag, Extraction.last_line):
        extractor(ExtractConfig(kind), key="x")(completion)
    assert time.process_time() - started < 2
