"""The chat format of one model family: the `renderers` package, asked carefully.

    messages ─▶ mark ─▶ package ─▶ contract ─▶ Rendered
                                   ├─ images: those that went in came out, in order, and have all image tokens
                                   ├─ control tokens: as many as without those that a text spells
                                   └─ messages: each one is in the tokens (remembered per structure)

Whatever the package or the tokenizer raises about messages is the fault of these messages (`UserFault`).

A bridge hands over only the end of the earlier turn: what the package adds depends on nothing else, and a long
conversation would cost the square of its length. The first bridge of each structure is also made from everything, and
compared.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from vlmrl.caches.lru import ByteLRU
from vlmrl.errors import UserFault, fenced
from vlmrl.rendering.chat_format import Rendered
from vlmrl.rendering.control_tokens import ControlTokens
from vlmrl.rendering.image_store import ImageStore
from vlmrl.rendering.memo_tokenizer import MemoTokenizer
from vlmrl.rendering.message_check import STRUCTURES_BYTES, MessageCheck, num_bytes, structure
from vlmrl.rendering.messages import images_to_package, to_package
from vlmrl.rendering.package import Renderers
from vlmrl.rendering.processors import StandInProcessor
from vlmrl.rendering.tool_calls import PROBE, PROBE_TOOL, answer_of, read_call, tool_entries
from vlmrl.types import (
    Answer,
    BrokenCall,
    ContractError,
    IntArray,
    Message,
    MMItem,
    Placeholder,
    Prompt,
    ToolCall,
    ToolSpec,
)

BROKEN = {
    "invalid_json": "is not valid JSON",
    "unclosed_block": "has no end",
    "missing_name": "has no name of a tool",
    "malformed_structure": "is not written as the chat format writes calls",
}
"""What the package says of a call that it cannot read → the words of `BrokenCall.reason`."""


class Grammar:
    """Messages to tokens. Several threads may use it at the same time."""

    surprises: tuple[str, ...] = ()

    def __init__(
        self,
        name: str,
        tokenizer: Any,
        image_processor: Any,
        images: ImageStore,
        parse_control_tokens: bool,
        options: Mapping[str, Any],
    ) -> None:
        """Raises `ConfigError` for a name or for options that the package does not have."""
        import renderers

        known = Renderers(name, options)
        self.name = name
        self.tokenizer = MemoTokenizer(tokenizer)
        self._package: Any = known.make(self.tokenizer, None)
        self._multimodal = renderers.is_multimodal(self._package)
        self._lock = threading.Lock()
        self._compared: ByteLRU[Hashable, bool] = ByteLRU(STRUCTURES_BYTES)
        self._messages = MessageCheck(name)
        self._needs_all = False

        self.stop_ids: tuple[int, ...] = tuple(self._package.get_stop_token_ids())
        self.image_tokens = frozenset(self._package.mm_token_type_id_map if self._multimodal else ())
        self.special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.special.update(tokenizer.all_special_ids)
        self.call_tokens = self._special_in_calls()
        self.special -= self.call_tokens
        control = self.special | {*self.stop_ids, *self.image_tokens} | self._turn_openers(tokenizer)
        control -= self.call_tokens
        self._control = ControlTokens(tokenizer, control, self.image_tokens)
        self._parse_control_tokens = parse_control_tokens
        if not parse_control_tokens:
            self.tokenizer = MemoTokenizer(tokenizer, self._control, self.call_tokens)
        elif self.call_tokens:
            self.tokenizer = MemoTokenizer(tokenizer, None, self.call_tokens)
        stand_in = StandInProcessor(image_processor, images) if self._multimodal else None
        self._package = known.make(self.tokenizer, stand_in)

    def _turn_openers(self, tokenizer: Any) -> set[int]:
        """The added tokens that begin a message, which not every tokenizer calls special."""
        chat = [{"role": role, "content": "x"} for role in ("system", "user", "assistant", "user")]
        for messages in (chat, chat[1:]):  # some families know no system message
            try:
                rendered = self._ask(partial(self._render_package, messages, True))
            except UserFault:
                continue
            owners = [-2, *rendered.message_indices]
            first = {
                id for id, owner, before in zip(rendered.token_ids, owners[1:], owners, strict=False) if owner != before
            }
            return first & set(tokenizer.added_tokens_decoder)
        return set()

    def _special_in_calls(self) -> set[int]:
        """The special tokens that an answer with a tool call has besides its end, so that a policy must sample them."""
        try:
            rendered = self._ask(lambda: self._render_package(to_package(PROBE, ()), False, (PROBE_TOOL,)))
        except UserFault:
            return set()  # the family has no tools
        sampled = {id for id, own in zip(rendered.token_ids, rendered.sampled_mask, strict=False) if own}
        return (sampled & self.special) - {*self.stop_ids[:1], *self.image_tokens}

    # ── whole conversations ─────────────────────────────────────────────────────────────────────────────────

    def encode(self, text: str) -> list[int]:
        """The tokens of a text; control tokens and placeholders that it spells are text."""
        return self._control.as_text(text)

    def render(
        self,
        messages: Sequence[Message],
        items: tuple[MMItem, ...],
        generate: bool,
        tools: Sequence[ToolSpec] = (),
    ) -> Rendered:
        """A conversation; with `generate` it ends where the policy is to answer. Raises `UserFault` and
        `ContractError`."""

        def tokens_of(conversation: Sequence[Message], tools: Sequence[ToolSpec] = tools) -> Any:
            return self._ask(lambda: self._render_package(to_package(conversation, items), generate, tools))

        marked, marked_tools, spelled = self._marked(messages, tools)
        rendered = tokens_of(marked, marked_tools)
        made = self._checked(rendered, items, begin=0, offset=0)
        if spelled:
            neutral = tokens_of(self._control.without(messages), self._control.tools_without(tools))
            self._control.check_same(rendered.token_ids, neutral.token_ids, self.name)
        if rendered.sampled_mask and len(rendered.sampled_mask) == len(rendered.token_ids):
            made = Rendered(
                made.token_ids, made.placeholders, tuple(rendered.sampled_mask), tuple(rendered.message_indices)
            )
        kind = f"render {generate} {len(tools)}"
        self._messages.check(kind, messages, lambda probe: self._text_of(tokens_of(probe)))
        return made

    def parse(self, completion_ids: IntArray, tools: Sequence[ToolSpec], prompt: Prompt | None) -> Answer:
        """The parts of a completion. What the package cannot read at all is a broken call."""
        before = {} if prompt is None else {"prompt_ids": prompt.token_ids.tolist()}
        ids = completion_ids.tolist()
        try:
            parsed = self._ask(lambda: self._package.parse_response(ids, tools=tool_entries(tools), **before))
        except UserFault as fault:
            text = self.tokenizer.text(tuple(ids))
            return Answer(text, broken=(BrokenCall(text, f"cannot be read ({fault.text})"),))
        found = [_call(each) for each in parsed.tool_calls or ()]
        return answer_of(parsed.content or "", parsed.reasoning_content or "", found)

    def bridge(
        self,
        previous: Prompt,
        completion_ids: IntArray,
        history: Sequence[Message],
        new_messages: Sequence[Message],
        new_items: tuple[MMItem, ...],
        tools: Sequence[ToolSpec] = (),
    ) -> Rendered | None:
        """What comes after `previous` and the completion; None where the family's grammar does not allow to extend
        them. `history` is not needed: the package works on tokens. Raises `UserFault` and `ContractError`."""
        begin = 0 if self._needs_all else self._begin_of_turn(previous.token_ids)
        made = self._bridge(previous, begin, completion_ids, new_messages, new_items, tools)
        if begin == 0:
            return made

        def alike() -> bool:
            whole = self._bridge(previous, 0, completion_ids, new_messages, new_items, tools)
            if whole is None or made is None:
                return whole is made
            return (whole.token_ids.tolist(), whole.placeholders) == (made.token_ids.tolist(), made.placeholders)

        key = (made is None, bool(tools), *structure(new_messages))
        if self._compared.get_or_make(key, alike, lambda _: num_bytes(new_messages)):
            return made
        self._needs_all = True
        return self.bridge(previous, completion_ids, history, new_messages, new_items, tools)

    def _bridge(
        self,
        previous: Prompt,
        begin: int,
        completion_ids: IntArray,
        new_messages: Sequence[Message],
        new_items: tuple[MMItem, ...],
        tools: Sequence[ToolSpec],
    ) -> Rendered | None:
        """`bridge` from token `begin` of the previous prompt on; its images are handed over where it is 0."""
        prompt_ids, images = previous.token_ids[begin:].tolist(), () if begin else previous.mm_items
        known = [*prompt_ids, *completion_ids.tolist()]

        def extended(messages: Sequence[Message]) -> Any:
            extra: dict[str, Any] = {"tools": tool_entries(tools)} if tools else {}
            if self._multimodal:
                extra["previous_multi_modal_data"] = None if begin else images_to_package(previous)
            return self._ask(
                lambda: self._package.bridge_to_next_turn(
                    prompt_ids, completion_ids.tolist(), to_package(messages, new_items), **extra
                )
            )

        marked, _, spelled = self._marked(new_messages, ())
        rendered = extended(marked)
        if rendered is None or rendered.token_ids[: len(known)] != known:
            return None  # the family's grammar cuts or rewrites the sampled tokens
        made = self._checked(rendered, images + new_items, begin=len(known), offset=begin)
        if spelled:
            neutral = extended(self._control.without(new_messages))
            self._control.check_same(rendered.token_ids, neutral.token_ids if neutral else (), self.name)
        self._messages.check("bridge", new_messages, lambda probe: self._text_of(extended(probe)))
        return made

    # ── the package ─────────────────────────────────────────────────────────────────────────────────────────

    def _ask(self, call: Callable[[], Any]) -> Any:
        with fenced(f"the chat format {self.name} does not take these messages: it", UserFault), self._lock:
            return call()

    def _render_package(self, messages: list[dict[str, Any]], generate: bool, tools: Sequence[ToolSpec] = ()) -> Any:
        extra = {"tools": tool_entries(tools)} if tools else {}
        return self._package.render(messages, add_generation_prompt=generate, **extra)

    def _text_of(self, rendered: Any) -> str | None:
        return None if rendered is None else self.tokenizer.decode(rendered.token_ids)

    def _begin_of_turn(self, token_ids: IntArray) -> int:
        """Where the last turn of a prompt begins: behind its last stop token. 0 where there is none."""
        window = 256
        while window < 2 * len(token_ids):
            end = token_ids[-window:]
            (stops,) = np.nonzero(np.isin(end, self.stop_ids))
            if len(stops) and stops[-1] + 1 < len(end):
                return len(token_ids) - len(end) + int(stops[-1]) + 1
            window *= 4
        return 0

    # ── what is checked ─────────────────────────────────────────────────────────────────────────────────────

    def _marked(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec]
    ) -> tuple[Sequence[Message], Sequence[ToolSpec], bool]:
        """Messages and tools with marks, and whether one of them spells a control token."""
        if self._parse_control_tokens:
            return messages, tools, False
        with fenced("the texts of the messages cannot be read: they", UserFault):
            marked, in_messages = self._control.mark(messages)
            marked_tools, in_tools = self._control.mark_tools(tools)
            return marked, marked_tools, in_messages or in_tools

    def _checked(self, rendered: Any, items: tuple[MMItem, ...], begin: int, offset: int) -> Rendered:
        """Tokens and placeholders from token `begin` on, where the package wrote; `offset` tokens stand before those
        that it was given.

        Raises `ContractError` unless the images that came back are those that went in, in the same order, and image
        tokens stand in placeholders only.
        """
        data = rendered.multi_modal_data
        ranges = data.mm_placeholders.get("image", []) if data else []
        outputs = data.mm_items.get("image", []) if data else []
        if not len(ranges) == len(outputs) == len(items):
            raise ContractError(
                f"{len(items)} images went into the renderer and {len(ranges)} came out: check whether the family's "
                "chat format allows images in messages of that role"
            )
        for item, output in zip(items, outputs, strict=True):
            if any(output[name] is not item.mm_kwargs[name] for name in output):
                raise ContractError(f"the renderer put other pixels where image {item.hash} belongs")
        written = rendered.token_ids[begin:]
        image_tokens = sum(id in self.image_tokens for id in written) if self.image_tokens else 0
        added = [(place, item) for place, item in zip(ranges, items, strict=True) if place.offset >= begin]
        expected = sum(place.length for place, _ in added)
        if image_tokens != expected:
            raise ContractError(
                f"{image_tokens} image tokens but {expected} placeholder positions: a message's text must not spell "
                "the image token"
            )
        token_ids = np.array(written, np.int64)
        token_ids.setflags(write=False)
        return Rendered(
            token_ids, tuple(Placeholder(place.offset + offset, place.length, item.hash) for place, item in added)
        )


def _call(parsed: Any) -> ToolCall | BrokenCall:
    """A call as the package has read it. A tool that there is not is still a call: its reply says so."""
    status = str(parsed.status)
    if status in ("ok", "unknown_tool"):
        return read_call(parsed.name, parsed.arguments, parsed.raw, parsed.id or "")
    return BrokenCall(parsed.raw, BROKEN.get(status, f"cannot be read ({status})"))
