"""Chat sessions whose tokens can be read: a renderer of characters with tool calls, and an engine session that answers
by a script and can be held."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from PIL import Image as PILImage

from support.lockstep import END, CharRenderer, text_of
from vlmrl.errors import EngineError
from vlmrl.inference.stop_strings import find_stop
from vlmrl.orchestrator.endpoint.media import DataMedia
from vlmrl.orchestrator.endpoint.request import ChatRequest, read_request
from vlmrl.orchestrator.endpoint.sampling import SessionSampling
from vlmrl.orchestrator.endpoint.session import Budgets, ChatSession
from vlmrl.orchestrator.rollout import sampling_seed
from vlmrl.orchestrator.sampling import OwnSampling
from vlmrl.rendering.images import decode, image_hash
from vlmrl.types import (
    Answer,
    BrokenCall,
    Completion,
    Image,
    ImageItem,
    IntArray,
    Message,
    MMItem,
    Prompt,
    SamplingParams,
    ToolCall,
    ToolSpec,
    Video,
)

CALL = re.compile(r"<(\w+) (.*?)>")
REASONING = re.compile(r"^\((.*?)\)")


class ChatRenderer(CharRenderer):
    """Answers are `(reasoning)text<tool {"argument": 1}>`; tools stand in front of the prompt as `[name]`."""

    async def first_turn(self, messages: Sequence[Message], tools: Sequence[ToolSpec] | None = None) -> Prompt:
        head = np.array([ord(each) for tool in tools or () for each in f"[{tool.name}]"], np.int64)
        return self._append(Prompt(head, (), ()), decoded(messages))

    async def next_turn(
        self,
        previous: Prompt,
        completion_ids: IntArray,
        history: Sequence[Message],
        new_messages: Sequence[Message],
        tools: Sequence[ToolSpec] | None = None,
    ) -> tuple[Prompt, bool]:
        self.histories.append(list(history))
        if not self.bridges:
            return await self.first_turn([*history, *new_messages], tools), False
        known = Prompt(np.concatenate([previous.token_ids, completion_ids]), previous.placeholders, previous.mm_items)
        return self._append(known, decoded(new_messages)), True

    def items(self, parts: Sequence[Image | Video]) -> tuple[MMItem, ...]:
        pixels = [decode(part.source) for part in parts]
        return tuple(ImageItem(image_hash(each), each, {}, 1) for each in pixels)

    def parse(self, completion_ids: IntArray, tools: Sequence[ToolSpec] = (), prompt: Prompt | None = None) -> Answer:
        text = self.decode(completion_ids)
        calls, broken = [], []
        for name, arguments in CALL.findall(text):
            try:
                calls.append(ToolCall(name, json.loads(arguments)))
            except ValueError:
                broken.append(BrokenCall(f"<{name} {arguments}>", "is not valid JSON"))
        text = CALL.sub("", text)
        found = REASONING.search(text)
        return Answer(REASONING.sub("", text), found[1] if found else "", tuple(calls), tuple(broken))


def decoded(messages: Sequence[Message]) -> list[Message]:
    """The messages with arrays in place of encoded images."""
    return [
        Message(
            each.role,
            tuple(
                Image(decode(part.source)) if isinstance(part, Image) and isinstance(part.source, bytes) else part
                for part in each.content
            ),
        )
        for each in messages
    ]


@dataclass(eq=False)
class ScriptedSession:
    """An `EngineSession` that answers with `script(prompt)`, after `gate` where one is set."""

    script: Callable[[str], str]
    gate: asyncio.Event | None = None
    asked: list[tuple[str, SamplingParams]] = field(default_factory=list)
    on_close: Callable[[], None] = lambda: None

    async def __aenter__(self) -> ScriptedSession:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.on_close()

    async def generate(self, prompt: Prompt, sampling: SamplingParams) -> Completion:
        self.asked.append((text_of(prompt), sampling))
        if self.gate is not None:
            await self.gate.wait()
        said = self.script(text_of(prompt))
        if said == "engine error":
            raise EngineError("the server of replica 0 has died")
        ids = np.array([*map(ord, said), END][: sampling.max_new_tokens], np.int64)
        found = find_stop(ids, sampling.stop, sampling.stop_token_ids, lambda ids: "".join(map(chr, ids)))
        if found is not None:
            ids = ids[: found[0]]
        return Completion(
            token_ids=ids,
            logprobs=np.full(len(ids), -0.5, np.float32),
            versions=np.zeros(len(ids), np.int64),
            finish_reason="stop" if ids[-1] == END or found is not None else "length",
            stop=None if found is None else found[1],
        )


class ScriptedEngine:
    """An `InferenceEngine` whose sessions answer with `script(prompt)`, after `gate` where one is set."""

    def __init__(self, script: Callable[[str], str]) -> None:
        self.script = script
        self.gate: asyncio.Event | None = None
        self.open: list[str] = []

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    def metrics(self) -> dict[str, float]:
        return {}

    def session(self, rollout_id: str, *, is_awaited: bool = True) -> ScriptedSession:
        assert not is_awaited, "the engine would wait for a foreign program"
        self.open.append(rollout_id)
        return ScriptedSession(self.script, self.gate, on_close=lambda: self.open.remove(rollout_id))


def chat_session(
    script: Callable[[str], str] = lambda prompt: "ok",
    *,
    renderer: Any = None,
    engine: Any = None,
    max_turns: int = 10,
    max_new_tokens: int = 50,
    max_model_len: int = 1000,
    name: str = "train/000001/00/00",
) -> ChatSession:
    """A session with scripted parts."""
    sampling = SessionSampling(OwnSampling(1.0, (END,), ()), partial(sampling_seed, 0, name), client_samples=True)
    budgets = Budgets(max_turns, max_new_tokens, max_model_len)
    return ChatSession(name, renderer or ChatRenderer(), engine or ScriptedSession(script), sampling, budgets)


IMAGES = DataMedia()


def asked(*messages: dict[str, Any], **body: Any) -> ChatRequest:
    """A parsed request of a client that leaves sampling to the run."""
    return read_request({"messages": list(messages), **body}, IMAGES, client_samples=False, temperature=1.0)


def asked_otherwise(*messages: dict[str, Any], **body: Any) -> ChatRequest:
    """A parsed request of a client that may sample in its own way."""
    return read_request({"messages": list(messages), **body}, IMAGES, client_samples=True, temperature=1.0)


def user(*content: str | dict[str, Any]) -> dict[str, Any]:
    """A user message: one text, or parts, in which a text may stand for its part."""
    if len(content) == 1 and isinstance(content[0], str):
        return {"role": "user", "content": content[0]}
    parts = [{"type": "text", "text": each} if isinstance(each, str) else each for each in content]
    return {"role": "user", "content": parts}


def assistant(text: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def picture(value: int, *, kind: str = "PNG", size: int = 8) -> dict[str, Any]:
    """An image part of one grey value; its pixels are the same as PNG and as BMP."""
    file = io.BytesIO()
    PILImage.new("RGB", (size, size), (value, value, value)).save(file, kind)
    data = base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/{kind.lower()};base64,{data}"}}


ZOOM = {"type": "function", "function": {"name": "zoom", "description": "d", "parameters": {"type": "object"}}}
