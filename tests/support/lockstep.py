"""A renderer of characters and an engine that answers in lockstep, for tests of rollouts.

A token id is the code point of a character, so prompts are readable. A message is `role:text`, an image is one `IMAGE`
token per feature, and `>` is the generation prompt. Like the embedded engine, the scripted one answers once every open
session has sent a request or closed: a runner that opened sessions late would get small batches, and one that closed
them late would hang.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from vlmrl.errors import EngineError
from vlmrl.inference.stop_strings import find_stop
from vlmrl.rendering.images import ImageError, decode, image_hash
from vlmrl.types import (
    Answer,
    BoolArray,
    Completion,
    EngineSession,
    Image,
    ImageItem,
    IntArray,
    Message,
    MMItem,
    Placeholder,
    Prompt,
    SamplingParams,
    Text,
    ToolSpec,
    Video,
    VideoItem,
)

IMAGE, END = ord("#"), ord("$")
BROKEN = "broken"


class CharRenderer:
    """`Renderer` in characters. An `Image.source` is its number of features, `BROKEN`, or an array with one feature; a
    `Video.source` is its number of frames."""

    stop_token_ids = (END,)
    banned_token_ids = (IMAGE,)
    image_token_ids = frozenset({IMAGE})

    def __init__(self, *, bridges: bool = True) -> None:
        self.bridges = bridges
        self.histories: list[list[Message]] = []

    async def first_turn(self, messages: Sequence[Message], tools: Sequence[ToolSpec] | None = None) -> Prompt:
        return self._append(Prompt(np.zeros(0, np.int64), (), ()), messages)

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
            return await self.first_turn([*history, *new_messages]), False
        token_ids = np.concatenate([previous.token_ids, completion_ids])
        return self._append(Prompt(token_ids, previous.placeholders, previous.mm_items), new_messages), True

    def items(self, parts: Sequence[Image | Video]) -> tuple[MMItem, ...]:
        raise AssertionError("rollouts take images from prompts")

    def decode(self, completion_ids: IntArray) -> str:
        return "".join(chr(i) for i in completion_ids if i != END)

    def parse(self, completion_ids: IntArray, tools: Sequence[ToolSpec] = (), prompt: Prompt | None = None) -> Answer:
        return Answer(self.decode(completion_ids))

    def check_tools(self) -> None:
        """Every tool can be used."""

    def render_conversation(
        self, messages: Sequence[Message], given: int = 0, tools: Sequence[ToolSpec] | None = None
    ) -> tuple[Prompt, BoolArray]:
        raise AssertionError("rollouts do not render demonstrations")

    def _append(self, prompt: Prompt, messages: Sequence[Message]) -> Prompt:
        ids, placeholders, items = prompt.token_ids.tolist(), list(prompt.placeholders), list(prompt.mm_items)
        for message in messages:
            ids += map(ord, f"{message.role}:")
            for part in message.content:
                if isinstance(part, Text):
                    ids += map(ord, part.text)
                    continue
                item: MMItem
                if isinstance(part, Video):
                    frames, times = np.zeros((part.source, 1, 1, 3), np.uint8), np.arange(part.source, dtype=np.float64)
                    item = VideoItem(f"hash-{part.source}", frames, times, 1.0, ("",) * part.source, {}, 1)
                    placeholders.append(Placeholder(len(ids), 1, item.hash, modality="video"))
                    items.append(item)
                    ids.append(IMAGE)
                    continue
                if isinstance(part.source, str):
                    raise ImageError("an image is broken")
                if isinstance(part.source, np.ndarray):
                    pixels = decode(part.source)
                    item = ImageItem(image_hash(pixels), pixels, {}, 1)
                else:
                    item = ImageItem(f"hash-{part.source}", np.zeros((1, 1, 3), np.uint8), {}, part.source)
                placeholders.append(Placeholder(len(ids), item.num_tokens, item.hash))
                items.append(item)
                ids += [IMAGE] * item.num_tokens
        return Prompt(np.array([*ids, ord(">")], np.int64), tuple(placeholders), tuple(items))


Policy: TypeAlias = Callable[[str, str], str]
"""(rollout id, prompt) → the completion, to which END is added. May raise."""


@dataclass(eq=False)
class LockstepSession:
    engine: LockstepEngine
    rollout_id: str

    async def __aenter__(self) -> EngineSession:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.engine.open.remove(self.rollout_id)
        self.engine.maybe_run()

    async def generate(self, prompt: Prompt, sampling: SamplingParams) -> Completion:
        future: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        self.engine.waiting.append((self.rollout_id, prompt, sampling, future))
        self.engine.maybe_run()
        return await future


@dataclass(eq=False)
class LockstepEngine:
    """An `InferenceEngine` that answers with `policy`, one batch of all open sessions at a time."""

    policy: Policy
    max_model_len: int = 10_000
    open: list[str] = field(default_factory=list)
    waiting: list[tuple[str, Prompt, SamplingParams, asyncio.Future[Completion]]] = field(default_factory=list)
    batches: list[list[tuple[str, SamplingParams]]] = field(default_factory=list)

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    def metrics(self) -> dict[str, float]:
        return {}

    def session(self, rollout_id: str, *, is_awaited: bool = True) -> EngineSession:
        assert rollout_id not in self.open
        self.open.append(rollout_id)
        return LockstepSession(self, rollout_id)

    def maybe_run(self) -> None:
        if not self.waiting or len(self.waiting) < len(self.open):
            return
        batch, self.waiting = self.waiting, []
        self.batches.append([(rollout_id, sampling) for rollout_id, _, sampling, _ in batch])
        for rollout_id, prompt, sampling, future in batch:
            if future.cancelled():
                continue
            assert 1 <= sampling.max_new_tokens <= self.max_model_len - len(prompt.token_ids)
            try:
                said = self.policy(rollout_id, text_of(prompt))
            except (EngineError, AssertionError) as error:
                future.set_exception(error)
                continue
            ids = np.array([*map(ord, said), END][: sampling.max_new_tokens], np.int64)
            found = find_stop(ids, sampling.stop, sampling.stop_token_ids, CharRenderer().decode)
            ids, stop = (ids, None) if found is None else (ids[: found[0]], found[1])
            future.set_result(
                Completion(
                    token_ids=ids,
                    logprobs=np.full(len(ids), -1.0, np.float32),
                    versions=np.zeros(len(ids), np.int64),
                    finish_reason="stop" if ids[-1] == END or stop is not None else "length",
                    stop=stop,
                )
            )


def text_of(prompt: Prompt) -> str:
    return "".join(map(chr, prompt.token_ids))
