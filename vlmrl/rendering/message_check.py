"""Checks that every message reaches the tokens: a chat format may drop one without a word."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace

from vlmrl.caches.lru import ByteLRU
from vlmrl.types import ContractError, Image, Message, Part, Text, ToolCall

STRUCTURES_BYTES = 4 << 20
"""Structures of conversations that are remembered: roles and kinds of parts."""


class MessageCheck:
    """Whether a message is in the tokens depends on roles, kinds of parts and numbers of tool calls only, so a
    conversation with a word of its own in each text and in each tool call is rendered once per structure. What a chat
    format strips from an assistant message (earlier thinking) is not looked for."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._complete: ByteLRU[Hashable, bool] = ByteLRU(STRUCTURES_BYTES)

    def check(self, kind: str, messages: Sequence[Message], text_of: Callable[[list[Message]], str | None]) -> None:
        """`text_of` renders a conversation to text, None where that is not possible. Raises `ContractError`."""

        def complete() -> bool:
            words, probe = words_of(messages)
            text = text_of(probe)
            for number, of_message in enumerate(words):
                if text is not None and any(word not in text for word in of_message):
                    raise ContractError(
                        f"message {number + 1} of {len(messages)} ({messages[number].role}) is left out of the prompt, "
                        f"in whole or in part, by the chat format {self._name}: put its text into another message"
                    )
            return True

        self._complete.get_or_make((kind, *structure(messages)), complete, lambda _: num_bytes(messages))


def structure(messages: Sequence[Message]) -> tuple[Hashable, ...]:
    """Roles, kinds of parts, and what a message has besides its parts."""
    return tuple(
        (m.role, len(m.tool_calls), bool(m.reasoning), bool(m.name), *(isinstance(part, Text) for part in m.content))
        for m in messages
    )


def num_bytes(messages: Sequence[Message]) -> int:
    """An estimate of the memory that the structure of a conversation takes."""
    return 200 + 100 * len(messages)


def words_of(messages: Sequence[Message]) -> tuple[list[list[str]], list[Message]]:
    """(The words of each message, the same conversation with a word in place of each text and of each tool call)."""
    words: list[list[str]] = []
    probe = []
    for message in messages:
        of_message: list[str] = []

        def word(of_message: list[str] = of_message) -> str:
            of_message.append(f"w{sum(map(len, words)) + len(of_message):05d}w")
            return of_message[-1]

        content = message.content if message.content or message.tool_calls else (Text(""),)
        parts: list[Part] = [part if isinstance(part, Image) else Text(word()) for part in content]
        calls = tuple(ToolCall(word(), {word(): word()}, call.id) for call in message.tool_calls)
        words.append(of_message)
        probe.append(replace(message, content=tuple(parts), tool_calls=calls))
    return words, probe
