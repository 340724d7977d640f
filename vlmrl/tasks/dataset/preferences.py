"""The two answers of a row of preferences.

chosen "red", rejected "blue"                                   two texts (or one message each) after a prompt
chosen [user, assistant red], rejected [user, assistant blue]   whole conversations that differ in their last answer
messages [user, assistant red], rejected "blue"                 the better answer is the last turn of the messages
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmrl.tasks.dataset.column_kinds import is_conversation
from vlmrl.tasks.dataset.columns import Unusable, as_text, is_missing, read, value_at
from vlmrl.tasks.dataset.conversation import Turn, turns_of
from vlmrl.tasks.dataset.layouts import Layout


def answers_of_pair(layout: Layout, row: Mapping[str, Any], said: str | None) -> tuple[str, str]:
    """The better and the worse answer. `said` is the last assistant turn of the messages, the better answer where no
    column has one. Raises `Unusable` where one of both is missing, and where both are equal.

    >>> row = {"a": "red", "b": [{"role": "assistant", "content": "no"}]}
    >>> answers_of_pair(Layout(chosen="a", rejected="b"), row, None)
    ('red', 'no')
    """
    assert layout.rejected is not None
    rejected, before_rejected = _answer(row, layout.rejected)
    if layout.chosen is None:
        if not said:
            raise Unusable("the row has no better answer, so there is no pair: fill its messages or leave the row out")
        chosen, before_chosen = said, list[Turn]()
    else:
        chosen, before_chosen = _answer(row, layout.chosen)
    if before_chosen and before_rejected and _words(before_chosen) != _words(before_rejected):
        raise Unusable(
            f"the columns {layout.chosen} and {layout.rejected} differ before their last answers, so they do not "
            "answer the same prompt: correct the row"
        )
    if chosen == rejected:
        raise Unusable("both answers are equal, so neither is better: correct the row or leave it out")
    return chosen, rejected


def _answer(row: Mapping[str, Any], column: str) -> tuple[str, list[Turn]]:
    """The answer in a cell, and the messages before it. Raises `Unusable`."""
    value = value_at(row, column)
    if is_missing(value):
        raise Unusable(f"the column {column} is empty, so there is no pair: fill it or leave the row out")
    if not isinstance(value, Mapping) and not is_conversation(value):
        return read(row, column, as_text), []
    *before, last = turns_of(value, column)
    if last.role != "assistant" or not last.text.strip():
        raise Unusable(
            f"the column {column} does not end with what the assistant says, so there is no answer: correct the row"
        )
    return last.text, before


def _words(turns: list[Turn]) -> list[tuple[str, str]]:
    return [(turn.role, turn.text) for turn in turns]
