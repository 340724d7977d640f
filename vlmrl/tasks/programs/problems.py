"""Problems that a program outside of the run plays, and what the program is told of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import orjson

from vlmrl.rendering.data_urls import part_of
from vlmrl.tasks.dataset.task import DatasetProblem
from vlmrl.types import Message, Part, Text


class PlayedOutside:
    """A problem whose episodes a program plays, which talks to the chat endpoint. It has no env."""

    id: str
    payload: Mapping[str, Any]
    """What the program is told, as values of JSON. To read it may take a moment, and may raise `ImageError`."""

    @property
    def messages(self) -> tuple[Message, ...]:
        """The prompt of the row; empty where the program makes the prompt itself."""
        return ()


def played_outside(problem: Any) -> PlayedOutside | None:
    """The problem that a program plays; None for one that has an env. A problem of a mixture, and one of the doctor's,
    has it inside."""
    while problem is not None and not isinstance(problem, PlayedOutside):
        problem = getattr(problem, "problem", None)
    return problem


@dataclass(frozen=True)
class NumberedProblem(PlayedOutside):
    """A problem that the program makes by itself, from a number."""

    id: str
    payload: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class RowProblem(PlayedOutside):
    """A row of a data set. Reward terms can score it (`vlmrl.tasks.base.Reference`)."""

    row: DatasetProblem
    facts: Mapping[str, Any]
    """What the program is told besides the row."""

    @property
    def id(self) -> str:  # type: ignore[override]
        return self.row.id

    @property
    def messages(self) -> tuple[Message, ...]:
        return self.row.messages

    @property
    def answer(self) -> Any:
        return self.row.answer

    @property
    def columns(self) -> Mapping[str, Any]:
        return self.row.columns

    @cached_property
    def payload(self) -> Mapping[str, Any]:  # type: ignore[override]
        """The prompt as messages of the chat API, the answer, and those columns that JSON can hold."""
        columns = {name: value for name, value in self.columns.items() if _is_plain(value)}
        answer = self.answer if _is_plain(self.answer) else None
        return {**self.facts, "messages": chat_messages(self.messages), "answer": answer, "columns": columns}


def chat_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages in the form of the chat API, with images and videos as data URLs (PNG, which keeps every
    pixel; a video file as it is).

    >>> chat_messages([Message.of("user", "Which digit?")])
    [{'role': 'user', 'content': [{'type': 'text', 'text': 'Which digit?'}]}]
    """
    return [{"role": message.role, "content": [_part(part) for part in message.content]} for message in messages]


def _part(part: Part) -> dict[str, Any]:
    return {"type": "text", "text": part.text} if isinstance(part, Text) else part_of(part)


def _is_plain(value: Any) -> bool:
    try:
        orjson.dumps(value)
    except TypeError:
        return False
    return True
