"""Checks that every message reaches the tokens: a chat format may drop one without a word."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

from vlmrl.caches.lru import ByteLRU
from vlmrl.types import ContractError, Image, Message, Part, Text

STRUCTURES_BYTES = 4 << 20
"""Structures of conversations that are remembered: roles and kinds of parts."""


class MessageCheck:
    """Whether a message is in the tokens depends on roles and kinds of parts only, so a conversation with a word of its
    own in each text is rendered once per structure. What a chat format strips from an assistant message (earlier
    thinking) is not looked for."""

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
    """Roles and kinds of parts."""
    return tuple((m.role, *(isinstance(part, Text) for part in m.content)) for m in messages)


def num_bytes(messages: Sequence[Message]) -> int:
    """An estimate of the memory that the structure of a conversation takes."""
    return 200 + 100 * len(messages)


def words_of(messages: Sequence[Message]) -> tuple[list[list[str]], list[Message]]:
    """(The words of each message, the same conversation with a word in place of each text)."""
    words: list[list[str]] = []
    probe = []
    for message in messages:
        of_message: list[str] = []
        parts: list[Part] = []
        for part in message.content or (Text(""),):
            if isinstance(part, Image):
                parts.append(part)
                continue
            of_message.append(f"w{sum(map(len, words)) + len(of_message):05d}w")
            parts.append(Text(of_message[-1]))
        words.append(of_message)
        probe.append(Message(message.role, tuple(parts)))
    return words, probe
