"""What the rest of the program calls to turn messages into tokens and pixels. renderer.py implements it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from vlmrl.types import Answer, BoolArray, Image, IntArray, Message, MMItem, Prompt, ToolSpec, Video


class Renderer(Protocol):
    """Messages to tokens and pixels, and completions back to text."""

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """A completion ends when one of these is sampled."""
        ...

    @property
    def banned_token_ids(self) -> tuple[int, ...]:
        """Tokens that must never be sampled: every special token except the end of turn, and ids that the tokenizer
        does not know."""
        ...

    @property
    def image_token_ids(self) -> frozenset[int]:
        """Placeholder tokens. A sample in which the policy sampled one is unusable."""
        ...

    async def first_turn(self, messages: Sequence[Message], tools: Sequence[ToolSpec] | None = None) -> Prompt:
        """The prompt of a conversation, which describes `tools`; None describes those of the run. Raises `UserFault`
        (`ImageError`) and `ContractError`."""
        ...

    async def next_turn(
        self,
        previous: Prompt,
        completion_ids: IntArray,
        history: Sequence[Message],
        new_messages: Sequence[Message],
        tools: Sequence[ToolSpec] | None = None,
    ) -> tuple[Prompt, bool]:
        """The prompt after a completion. `history` is everything before `new_messages`, assistant texts included.
        `tools` are those of the first turn.

        True: bridged, that is, the prompt begins with `previous` and `completion_ids` (int64 [C]). False: the whole
        conversation was rendered again and a new branch begins. Raises `UserFault` (`ImageError`) and `ContractError`.
        """
        ...

    def items(self, parts: Sequence[Image | Video]) -> tuple[MMItem, ...]:
        """The processed images and videos, one per part, as prompts hold them. Blocks while new ones are processed.
        Raises `ImageError`."""
        ...

    def decode(self, completion_ids: IntArray) -> str:
        """The text of a completion, without special tokens, but with those that write a tool call."""
        ...

    def parse(self, completion_ids: IntArray, tools: Sequence[ToolSpec] = (), prompt: Prompt | None = None) -> Answer:
        """The parts of a completion: text, reasoning and tool calls. `prompt` is the one that it was sampled for, where
        that is known. What cannot be read is a `BrokenCall`."""
        ...

    def check_tools(self) -> None:
        """Raise `ConfigError` where the chat format cannot describe tools, or where its calls cannot be read."""
        ...

    def render_conversation(
        self, messages: Sequence[Message], given: int = 0, tools: Sequence[ToolSpec] | None = None
    ) -> tuple[Prompt, BoolArray]:
        """A whole conversation with assistant turns, and bool [P]: True on tokens that a policy would have sampled, in
        messages after the first `given` ones.

        Blocks while new images are processed. Raises `UserFault` (also `ImageError`, and where one of these tokens can
        never be sampled) and `ContractError`.
        """
        ...
