"""Wrappers that record what passes through renderer, engine and model while rollouts are played.

task ─▶ WatchedRenderer ─▶ WatchedEngine ─▶ rollouts ─▶ samples
        RenderedTurns      requests         Evidence
        (watched_rows: the rows of the embedded engine's forward passes)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from vlmrl.models.policy import Policy
from vlmrl.rendering.images import decode
from vlmrl.rendering.renderer import Renderer
from vlmrl.runs.doctor.evidence import RenderedTurn, media_of, with_media
from vlmrl.runs.wrapped_engine import WrappedEngine, WrappedSession
from vlmrl.types import (
    Answer,
    BoolArray,
    Completion,
    EngineSession,
    Image,
    InferenceEngine,
    IntArray,
    Message,
    MMItem,
    Prompt,
    SamplingParams,
    ToolSpec,
    Video,
)


class WatchedRenderer:
    """A `Renderer` that records each prompt it makes with the messages it was made from."""

    def __init__(self, renderer: Renderer) -> None:
        self._renderer = renderer
        self.rendered: list[RenderedTurn] = []

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        return self._renderer.stop_token_ids

    @property
    def banned_token_ids(self) -> tuple[int, ...]:
        return self._renderer.banned_token_ids

    @property
    def image_token_ids(self) -> frozenset[int]:
        return self._renderer.image_token_ids

    async def first_turn(self, messages: Sequence[Message], tools: Sequence[ToolSpec] | None = None) -> Prompt:
        seen = _decoded(messages)
        prompt = await self._renderer.first_turn(messages, tools)
        self.rendered.append(RenderedTurn(_with_read_files(seen, prompt), prompt, is_first=True))
        return prompt

    async def next_turn(
        self,
        previous: Prompt,
        completion_ids: IntArray,
        history: Sequence[Message],
        new_messages: Sequence[Message],
        tools: Sequence[ToolSpec] | None = None,
    ) -> tuple[Prompt, bool]:
        seen = _decoded(new_messages)
        prompt, bridged = await self._renderer.next_turn(previous, completion_ids, history, new_messages, tools)
        self.rendered.append(RenderedTurn(_with_read_files(seen, prompt), prompt, is_first=False))
        return prompt, bridged

    def items(self, parts: Sequence[Image | Video]) -> tuple[MMItem, ...]:
        return self._renderer.items(parts)

    def decode(self, completion_ids: IntArray) -> str:
        return self._renderer.decode(completion_ids)

    def parse(self, completion_ids: IntArray, tools: Sequence[ToolSpec] = (), prompt: Prompt | None = None) -> Answer:
        return self._renderer.parse(completion_ids, tools, prompt)

    def check_tools(self) -> None:
        self._renderer.check_tools()

    def render_conversation(
        self, messages: Sequence[Message], given: int = 0, tools: Sequence[ToolSpec] | None = None
    ) -> tuple[Prompt, BoolArray]:
        return self._renderer.render_conversation(messages, given, tools)


def _decoded(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The messages with their images and frames decoded now, because an env may draw on them later. Raises
    `ImageError`."""
    return with_media(messages, map(_decoded_part, media_of(messages)))


def _decoded_part(part: Image | Video) -> Image | Video:
    if isinstance(part, Image):
        return Image(decode(part.source))
    if _is_file(part):
        return part
    frames = [decode(frame) for frame in part.source]
    # The renderer refuses what does not fit together.
    return Video(np.stack(frames), part.fps, part.times) if len({f.shape for f in frames}) == 1 else part


def _is_file(part: Image | Video) -> bool:
    return isinstance(part.source, str | bytes | Path)


def _with_read_files(messages: tuple[Message, ...], prompt: Prompt) -> tuple[Message, ...]:
    """The messages, whose files of videos are replaced by the frames that the renderer has read from them."""
    media = media_of(messages)
    videos = [part for part in media if isinstance(part, Video)]
    items = prompt.videos[len(prompt.videos) - len(videos) :]
    read = {
        id(part): Video(item.frames, item.rate, item.times.tolist()) for part, item in zip(videos, items, strict=True)
    }
    return with_media(messages, [read[id(part)] if _is_file(part) else part for part in media])


class WatchedEngine(WrappedEngine):
    """An engine that records its requests and reports every completion as stopped.

    A policy that does not end its answers yet would have no second turn, and later turns bring images of their own.
    """

    def __init__(self, engine: InferenceEngine) -> None:
        super().__init__(engine)
        self.requests: list[Prompt] = []

    def session(self, rollout_id: str, *, is_awaited: bool = True) -> _WatchedSession:
        return _WatchedSession(self._engine.session(rollout_id, is_awaited=is_awaited), self.requests)


class _WatchedSession(WrappedSession):
    def __init__(self, session: EngineSession, requests: list[Prompt]) -> None:
        super().__init__(session)
        self._requests = requests

    async def generate(self, prompt: Prompt, sampling: SamplingParams) -> Completion:
        completion = await self._session.generate(prompt, sampling)
        self._requests.append(prompt)
        return dataclasses.replace(completion, finish_reason="stop")


class ScriptedEngine:
    """An engine that gives every prompt the same completion.

    With the token ids that the tokenizer makes of a text, the next prompt is the chat template's for that conversation.
    """

    def __init__(self, token_ids: IntArray) -> None:
        self._completion = Completion(
            token_ids, np.zeros(len(token_ids), np.float32), np.zeros(len(token_ids), np.int64), "stop"
        )

    async def start(self) -> None:
        """Do nothing."""

    async def stop(self) -> None:
        """Do nothing."""

    def session(self, rollout_id: str, *, is_awaited: bool = True) -> ScriptedEngine:
        return self

    async def __aenter__(self) -> ScriptedEngine:
        return self

    async def __aexit__(self, *exc: object) -> None:
        """Do nothing."""

    async def generate(self, prompt: Prompt, sampling: SamplingParams) -> Completion:
        return self._completion

    def metrics(self) -> dict[str, float]:
        return {}


@dataclass(eq=False)
class Rows:
    """Token ids and positions of the rows that a model computed while it was watched."""

    batches: list[IntArray] = field(default_factory=list)

    def distinct(self) -> IntArray | None:
        """int64 [rows, 1 + position rows], each distinct row once; None where the model computed nothing."""
        return np.unique(np.concatenate(self.batches), axis=0) if self.batches else None


@contextmanager
def watched_rows(policy: Policy) -> Iterator[Rows]:
    """Record token id and positions of every row that the policy's model computes inside the block, also for an engine
    with a `Policy` of its own around that model."""
    rows = Rows()
    asked: list[IntArray] = []
    hidden_states = Policy.hidden_states

    def watched(asked_policy: Policy, token_ids: Tensor, *arguments: Any, **more: Any) -> Tensor:
        if asked_policy.model is policy.model:
            asked.append(token_ids[None].cpu().numpy())
        return hidden_states(asked_policy, token_ids, *arguments, **more)

    def decoder_hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        token_ids = asked.pop()
        positions = kwargs["position_ids"].reshape(-1, token_ids.shape[1]).cpu().numpy()
        rows.batches.append(np.concatenate([token_ids, positions]).T)

    handle = policy.model.base_model.get_decoder().register_forward_pre_hook(decoder_hook, with_kwargs=True)
    Policy.hidden_states = watched  # type: ignore[method-assign, assignment]
    try:
        yield rows
    finally:
        handle.remove()
        Policy.hidden_states = hidden_states  # type: ignore[method-assign]
