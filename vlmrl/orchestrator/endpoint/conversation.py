"""When two conversations are equal.

Clients do not send back what they got: they re-serialize the arguments of tool calls, strip white space, drop the
reasoning, and encode images again. So conversations are compared by their parsed parts:

    roles               equal
    text                equal; of the assistant's, without white space around it
    images              equal pixels (`ImageItem.hash`)
    videos              equal frames and times (`VideoItem.hash`)
    tool calls          equal names and equal arguments as JSON; their ids may differ
    reasoning           not compared

A conversation has one digest per message, of everything up to that message, so that the longest earlier conversation
that it extends is found by looking up its digests from the last to the first.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from vlmrl.orchestrator.endpoint.request import ChatRequest
from vlmrl.rendering.messages import shown_in
from vlmrl.rendering.renderer import Renderer
from vlmrl.types import Image, Message, MMItem, Text, ToolSpec, Video

DIGEST_BYTES = 16


@dataclass(frozen=True, eq=False)
class Conversation:
    """The digests of a request's conversation."""

    digests: tuple[bytes, ...]
    """One per message: of the tools, and of the messages up to it."""
    request: bytes
    """Of the whole request. A repeated request has the same."""
    items: tuple[MMItem, ...]
    """The images of its messages, kept alive as long as the conversation is."""


async def conversation_of(
    request: ChatRequest, renderer: Renderer, known: Mapping[Image | Video, MMItem]
) -> Conversation:
    """The conversation of a request. `known` are images of earlier requests, which need not be looked up again.

    Raises `ImageError` for an image that cannot be read.
    """
    parts = shown_in(request.messages)
    new = [part for part in dict.fromkeys(parts) if part not in known]
    found = dict(known)
    if new:
        found.update(zip(new, await asyncio.to_thread(renderer.items, new), strict=True))
    digests, digest = [], tools_digest(request.tools, request.lane)
    for message in request.messages:
        digest = extended(digest, message, [found[part].hash for part in shown_in([message])])
        digests.append(digest)
    return Conversation(tuple(digests), _request_digest(digest, request), tuple(found[part] for part in parts))


def tools_digest(tools: Sequence[ToolSpec], lane: str = "") -> bytes:
    """The digest of a conversation without messages."""
    return _digest(lane.encode(), [[tool.name, tool.description, canonical(tool.parameters)] for tool in tools])


def canonical(value: Any) -> str:
    """JSON that is equal for values that a client may write in two ways.

    >>> canonical({"b": 1.0, "a": [2]}) == canonical({"a": [2], "b": 1})
    True
    """
    return json.dumps(_plain(value), sort_keys=True, ensure_ascii=True, separators=(",", ":"))


def _plain(value: Any) -> Any:
    """A JSON value whose whole numbers are integers: some languages write 1.0 as 1."""
    match value:
        case float() if value.is_integer():
            return int(value)
        case Mapping():
            return {key: _plain(each) for key, each in value.items()}
        case list() | tuple():
            return [_plain(each) for each in value]
        case _:
            return value


def extended(digest: bytes, message: Message, hashes: Sequence[str] = ()) -> bytes:
    """The digest of a conversation after one more message, whose images have these hashes.

    >>> start = tools_digest(())
    >>> extended(start, Message.of("assistant", "A ")) == extended(start, Message.of("assistant", "\\nA"))
    True
    >>> extended(start, Message.of("user", "A ")) == extended(start, Message.of("user", "A"))
    False
    """
    remaining = iter(hashes)
    parts: list[Any] = []
    for part in message.content:
        if not isinstance(part, Text):
            parts.append([next(remaining)])
        elif parts and isinstance(parts[-1], str):
            parts[-1] += part.text
        else:
            parts.append(part.text)
    if message.role == "assistant":
        parts = [part for part in (each.strip() if isinstance(each, str) else each for each in parts) if part]
    calls = [[call.name, canonical(call.arguments)] for call in message.tool_calls]
    return _digest(digest, [message.role, parts, calls, message.tool_call_id])


def _request_digest(conversation: bytes, request: ChatRequest) -> bytes:
    own = request.sampling
    return _digest(
        conversation,
        [
            *(request.stop, request.max_tokens, request.tag),
            *(own.temperature, own.top_p, own.top_k, own.seed),
        ],
    )


def _digest(before: bytes, value: Any) -> bytes:
    content = orjson.dumps(value, option=orjson.OPT_SORT_KEYS)
    return hashlib.blake2b(before + content, digest_size=DIGEST_BYTES).digest()
