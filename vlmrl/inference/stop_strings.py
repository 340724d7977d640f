"""Stop strings: find the token that completes one of them in the text of a completion.

    tokens      "Th", "ought", ": Obs", "ervation: x"        stop string "Observation:"
    texts       Th │ Thought │ Thought: Obs │ Thought: Observation: x
    completion  all four tokens: the fourth completes the stop string
    the task    "Thought: ", the text before the stop string (`text_before`)

Both engines use this one definition, so they end a completion at the same token: after token k, the text is what the
renderer decodes from tokens 1 to k, without a character at its end of which bytes are missing. A completion ends with
the first token whose text contains a stop string. If a token completes several, the one that ends first counts, and of
those that end together the longest.

The text has no special tokens, so a stop string cannot name one: the renderer's stop tokens end a completion anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeAlias

import numpy as np

from vlmrl.types import Answer, IntArray

TextOf: TypeAlias = Callable[[IntArray], str]
"""The text of token ids without special tokens: `Renderer.decode`."""

INCOMPLETE = "\ufffd"
"""What a tokenizer decodes from bytes that are not, or not yet, a character."""

CONTEXT = 8
"""Characters that are decoded before a place where a stop string may begin: a text that is decoded from the middle may
begin with up to three incomplete bytes, and some tokenizers drop a space at the beginning."""


def first_in(text: str, stop: Sequence[str]) -> str | None:
    """The stop string in `text` that ends first, and the longest of those that end together; None without any.

    >>> first_in("x END. END", ["END", "ND", "."]), first_in("x", ["END"])
    ('END', None)
    """
    found = [(text.index(each) + len(each), -len(each), each) for each in stop if each in text]
    return min(found)[2] if found else None


def text_before(text: str, stop: str | None) -> str:
    """The part of a completion's text that counts as its answer: what stands before the stop string that ended it, or
    all of it where no stop string did.

    >>> text_before("Thought: Observation: x", "Observation:"), text_before("Thought: ", None)
    ('Thought: ', 'Thought: ')
    """
    return text if stop is None else text.partition(stop)[0]


def answer_before(answer: Answer, stop: str | None) -> Answer:
    """A parsed answer without the stop string that ended it and what stands behind it.

    >>> answer_before(Answer("look. Observation: x", "hm"), "Observation:")
    Answer(text='look. ', reasoning='hm', calls=(), broken=())
    """
    if stop is None:
        return answer
    broken = tuple(replace(each, text=text_before(each.text, stop)) for each in answer.broken)
    text, reasoning = text_before(answer.text, stop), text_before(answer.reasoning, stop)
    return replace(answer, text=text, reasoning=reasoning, broken=broken)


class StopFinder:
    """Finds the token that completes a stop string, one token after the other.

    Only the last tokens are decoded at each step, so the cost does not grow with the completion.
    """

    def __init__(self, stop: Sequence[str], text_of: TextOf) -> None:
        """`stop` has at least one text, and none is empty."""
        assert stop, "there are no stop strings to find"
        assert all(stop), "an empty stop string would end every completion at its first token"
        self._stop = stop
        self._text_of = text_of
        self._reach = max(map(len, stop)) + CONTEXT
        self._token_ids: list[int] = []
        self._begin = 0
        """The first token that is decoded at each step."""

    def add(self, token: int) -> str | None:
        """The stop string that the next token completes; None where it completes none."""
        self._token_ids.append(token)
        tail = self._text_from(self._begin)
        if any(each in tail for each in self._stop):
            return first_in(self._text_from(0), self._stop)
        if len(tail) > 4 * self._reach:
            self._move_on()
        return None

    def _move_on(self) -> None:
        """Decode fewer tokens from now on, but as many as a stop string can reach back."""
        count = 1
        while len(self._text_from(len(self._token_ids) - count)) < self._reach:
            count *= 2
        self._begin = max(self._begin, len(self._token_ids) - count)

    def _text_from(self, begin: int) -> str:
        return self._text_of(np.array(self._token_ids[max(begin, 0) :], np.int64)).rstrip(INCOMPLETE)


def find_stop(
    token_ids: IntArray, stop: Sequence[str], stop_token_ids: Sequence[int], text_of: TextOf
) -> tuple[int, str] | None:
    """The number of tokens after which a stop string ends the completion `token_ids` (int64 [C]), and that string; None
    where no stop string ends it. A stop token ends a completion before a stop string that it would complete."""
    if not stop or not any(each in text_of(token_ids) for each in stop):
        return None
    finder = StopFinder(stop, text_of)
    for count, token in enumerate(token_ids.tolist(), 1):
        if token in stop_token_ids:
            return None
        if (found := finder.add(token)) is not None:
            return count, found
    return None
