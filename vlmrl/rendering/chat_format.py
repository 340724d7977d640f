"""What a renderer asks of a chat format: the tokens of a conversation, and what follows an answer.

    grammar.py    the `renderers` package, or a renderer of the user's own with its interface
    template/     the checkpoint's own chat template and processor

`FamilyRenderer` (renderer.py) stands on either: it memoizes, asserts the contract, and keeps the images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from vlmrl.types import Answer, IntArray, Message, MMItem, Placeholder, Prompt, ToolSpec


@dataclass(frozen=True, eq=False)
class Rendered:
    """Tokens and placeholders of a conversation, or what a bridge adds after the completion."""

    token_ids: IntArray
    """int64 [P], read-only."""
    placeholders: tuple[Placeholder, ...]
    sampled_mask: tuple[bool, ...] = ()
    """True on tokens that a policy would have sampled; empty where the family does not say, and for bridges."""
    message_of: tuple[int, ...] = ()
    """The index of each token's message, −1 for none; given with `sampled_mask`."""


class Tokens(Protocol):
    """Token ids to text."""

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str: ...

    def text(self, token_ids: tuple[int, ...]) -> str:
        """The text of token ids, without special tokens."""
        ...


class ChatFormat(Protocol):
    """The chat format of one model. Several threads may use it at the same time."""

    @property
    def name(self) -> str:
        """The value of `orchestrator.renderer.name`."""
        ...

    @property
    def surprises(self) -> tuple[str, ...]:
        """What it does beyond writing the messages down, as sentences for people."""
        ...

    @property
    def tokenizer(self) -> Tokens: ...

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a generation. The first one closes a turn; the others end a document."""
        ...

    @property
    def image_tokens(self) -> frozenset[int]:
        """Placeholder tokens, which a policy must not sample."""
        ...

    @property
    def special(self) -> set[int]:
        """Special tokens. A policy samples none of them but the first of `stop_ids`."""
        ...

    def encode(self, text: str) -> list[int]:
        """The tokens of a text; control tokens and placeholders that it spells are text."""
        ...

    def render(
        self,
        messages: Sequence[Message],
        items: tuple[MMItem, ...],
        generate: bool,
        tools: Sequence[ToolSpec] = (),
    ) -> Rendered:
        """A conversation; with `generate` it ends where the policy is to answer. `tools` are described as the family
        does it. Raises `UserFault` and `ContractError`."""
        ...

    def parse(self, completion_ids: IntArray, tools: Sequence[ToolSpec], prompt: Prompt | None) -> Answer:
        """The parts of a completion. `prompt` is the one that it was sampled for, where that is known: it tells whether
        the completion begins inside of reasoning. Raises nothing for what a policy samples."""
        ...

    def bridge(
        self,
        previous: Prompt,
        completion_ids: IntArray,
        history: Sequence[Message],
        new_messages: Sequence[Message],
        new_items: tuple[MMItem, ...],
        tools: Sequence[ToolSpec] = (),
    ) -> Rendered | None:
        """What comes after `previous` and the completion; None where the format does not allow to extend them.
        `history` is everything before `new_messages`, the answer included. Raises `UserFault` and `ContractError`."""
        ...
