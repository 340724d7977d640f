"""Which token ends a completion by a stop string."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from vlmrl.inference.stop_strings import StopFinder, answer_before, find_stop, text_before
from vlmrl.types import Answer, BrokenCall, IntArray, ToolCall

PIECES = {
    1: b"Th",
    2: b"ought",
    3: b": Obs",
    4: b"ervation",
    5: b": x and more",
    6: b"\xe2\x82",  # two of the three bytes of the euro sign
    7: b"\xac",
    8: b"",  # a special token, which has no text
    9: b" ",
    10: b"\xf0\x9f\x98\x80!",
    11: b"END",
    12: b"a\xe2",
}
SPECIAL = 8


def text_of(token_ids: IntArray) -> str:
    """As a tokenizer of bytes decodes: what is no character becomes U+FFFD."""
    return b"".join(PIECES[int(token)] for token in token_ids).decode(errors="replace")


@pytest.mark.parametrize(
    ("tokens", "stop", "expected"),
    [
        pytest.param([1, 2, 3, 4, 5], ["Observation"], (4, "Observation"), id="spans two tokens"),
        pytest.param([1, 2, 3, 4, 5], ["Observation:"], (5, "Observation:"), id="text goes on behind it in its token"),
        pytest.param([1, 2, 5], [" and "], (3, " and "), id="inside one token"),
        pytest.param([1, 6, 7, 2], ["\u20ac"], (3, "\u20ac"), id="a character of two tokens"),
        pytest.param([1, 6, 7, 2], ["Th\u20ac"], (3, "Th\u20ac"), id="ends with a character of two tokens"),
        pytest.param([10, 1], ["!"], (1, "!"), id="behind a character of four bytes"),
        pytest.param([1, 2, 3, 4], ["ation", "Obs"], (3, "Obs"), id="several: the one that ends first"),
        pytest.param([1, 5], [" and more", "x", "and"], (2, "x"), id="several in one token: the one that ends first"),
        pytest.param([1, 2, 4], ["vation", "ervation", "on"], (3, "ervation"), id="end together: the longest"),
        pytest.param([1, 2, 3], ["END"], None, id="never"),
        pytest.param([11, 8], ["END"], (1, "END"), id="before the stop token"),
        pytest.param([9, 8, 11], ["END"], None, id="behind the stop token"),
        pytest.param([1, 8], ["Thx"], None, id="a stop token has no text"),
        pytest.param([12, 1], ["a"], (1, "a"), id="before half a character"),
        pytest.param([1, 6], ["\u20ac"], None, id="half a character is none"),
        pytest.param([1, 6, 2], ["Thou", "ought"], (3, "ought"), id="half a character stays between"),
        pytest.param([1, 2, 3, 4], [], None, id="no stop strings"),
    ],
)
def test_the_first_token_that_completes_a_stop_string_ends_the_completion(
    tokens: list[int], stop: list[str], expected: tuple[int, str] | None
) -> None:
    assert find_stop(np.array(tokens), stop, [SPECIAL], text_of) == expected


def test_the_task_sees_the_text_before_the_stop_string() -> None:
    assert text_before(text_of(np.array([1, 2, 3, 4, 5])), "Observation:") == "Thought: "
    assert text_before(text_of(np.array([1, 2])), None) == "Thought"


def test_a_parsed_answer_ends_before_the_stop_string() -> None:
    """Wherever the stop string stands: in the text, in reasoning that was not closed, or in a call."""
    call = ToolCall("zoom", {"image": 1})
    answer = Answer("see END it", "why", (call,), (BrokenCall("<tool_call>{END", "it is not closed"),))
    assert answer_before(answer, "END") == Answer(
        "see ", "why", (call,), (BrokenCall("<tool_call>{", "it is not closed"),)
    )
    assert answer_before(Answer("", "why END"), "END") == Answer("", "why ")
    assert answer_before(answer, None) is answer


def test_a_long_completion_is_not_decoded_again_at_every_token() -> None:
    """A stop string is found wherever it begins in what is decoded, and few tokens are decoded at a time."""
    for before in range(250):
        sizes: list[int] = []

        def counted(token_ids: IntArray, sizes: list[int] = sizes) -> str:
            sizes.append(len(token_ids))
            return text_of(token_ids)

        finder = StopFinder(["Observation: x"], counted)
        found = [finder.add(token) for token in [*([9] * before), 3, 4, 5]]
        assert found == [None] * (before + 2) + ["Observation: x"]
        assert max(sizes[:-1]) <= 130, "a window of the stop string's length, several times"
        assert sizes[-1] == before + 3, "what was found is looked at in the whole text"


@pytest.mark.parametrize("stop", [[], [""], ["x", ""]])
def test_an_empty_stop_string_is_refused(stop: list[str]) -> None:
    finder: Callable[[], StopFinder] = lambda: StopFinder(stop, text_of)  # noqa: E731
    with pytest.raises(AssertionError):
        finder()
