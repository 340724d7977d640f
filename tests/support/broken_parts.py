"""Parts of a run with one fault each, around the real ones."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from vlmrl.errors import EngineError
from vlmrl.inference.embedded.engine import EmbeddedEngine
from vlmrl.models import digests as verify
from vlmrl.models.policy import Policy
from vlmrl.rendering.renderer import Renderer
from vlmrl.runs.build import Run
from vlmrl.types import (
    Answer,
    BoolArray,
    Completion,
    EngineSession,
    Image,
    ImageItem,
    InferenceEngine,
    IntArray,
    Message,
    MMItem,
    Prompt,
    SamplingParams,
    ToolSpec,
    Video,
    WeightComparison,
)

# ── an engine with weights of its own ───────────────────────────────────────────────────────────────────────


class CopySync:
    """Brings weights to an engine that has a model of its own, name by name, through `carry`."""

    def __init__(self, ours: Callable[[], Mapping[str, Tensor]], theirs: Mapping[str, Tensor]) -> None:
        self._ours, self._theirs = ours, theirs
        self.version = -1
        self.carry: Callable[[int, str, Tensor], Tensor | None] = lambda version, name, tensor: tensor

    async def publish(self, version: int) -> None:
        for name, tensor in self._ours().items():
            carried = self.carry(version, name, tensor)
            if carried is not None:
                self._theirs[name].data.copy_(carried)
        self.version = version

    async def compare(self) -> WeightComparison:
        return await asyncio.to_thread(verify.compare, self._ours(), self._theirs)

    def close(self) -> None:
        """Nothing was made."""


def apart(run: Run) -> CopySync:
    """Give the run an engine with a model of its own, and the sync between the two."""
    model: Any = copy.deepcopy(run.policy.model)
    theirs = Policy(model, run.policy.positions, run.renderer.banned_token_ids)
    sync = CopySync(run.trainer.weights, dict(model.named_parameters()))
    run.engine = EmbeddedEngine(theirs, lambda: sync.version, run.config.inference.max_model_len)
    run.weight_sync = sync
    return sync


# ── what the engine gets to see ─────────────────────────────────────────────────────────────────────────────


class TamperingEngine:
    """Changes prompts and answers on their way."""

    def __init__(
        self,
        engine: InferenceEngine,
        prompt: Callable[[Prompt], Prompt] = lambda prompt: prompt,
        completion: Callable[[Completion], Completion] = lambda completion: completion,
    ) -> None:
        self._engine = engine
        self.prompt, self.completion = prompt, completion

    async def start(self) -> None:
        await self._engine.start()

    async def stop(self) -> None:
        await self._engine.stop()

    def session(self, rollout_id: str, *, is_awaited: bool = True) -> TamperingSession:
        return TamperingSession(self, self._engine.session(rollout_id, is_awaited=is_awaited))

    def metrics(self) -> dict[str, float]:
        return self._engine.metrics()


class TamperingSession:
    def __init__(self, engine: TamperingEngine, session: EngineSession) -> None:
        self._engine, self._session = engine, session

    async def __aenter__(self) -> TamperingSession:
        await self._session.__aenter__()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._session.__aexit__(*exc)

    async def generate(self, prompt: Prompt, sampling: SamplingParams) -> Completion:
        completion = await self._session.generate(self._engine.prompt(prompt), sampling)
        return self._engine.completion(completion)


def with_pixels(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Prompt], Prompt]:
    """Other `pixel_values` under the same hash."""

    def changed(image: ImageItem) -> ImageItem:
        return dataclasses.replace(
            image, mm_kwargs=image.mm_kwargs | {"pixel_values": change(image.mm_kwargs["pixel_values"])}
        )

    return lambda prompt: dataclasses.replace(prompt, mm_items=tuple(map(changed, prompt.images)))


def refuses(prompt: Prompt) -> Prompt:
    raise EngineError("out of order")


# ── what the renderer makes ─────────────────────────────────────────────────────────────────────────────────


class TamperingRenderer:
    """Changes messages before they are rendered, and prompts after."""

    def __init__(
        self,
        renderer: Renderer,
        messages: Callable[[Sequence[Message]], Sequence[Message]] = lambda messages: messages,
        prompt: Callable[[Prompt], Prompt] = lambda prompt: prompt,
    ) -> None:
        self._renderer = renderer
        self._messages, self._prompt = messages, prompt
        self._original: dict[int, tuple[Prompt, Prompt]] = {}

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
        return self._changed(await self._renderer.first_turn(self._messages(messages), tools))

    async def next_turn(
        self,
        previous: Prompt,
        completion_ids: IntArray,
        history: Sequence[Message],
        new_messages: Sequence[Message],
        tools: Sequence[ToolSpec] | None = None,
    ) -> tuple[Prompt, bool]:
        _, original = self._original[id(previous)]
        prompt, bridged = await self._renderer.next_turn(original, completion_ids, history, new_messages, tools)
        return self._changed(prompt), bridged

    def _changed(self, prompt: Prompt) -> Prompt:
        changed = self._prompt(prompt)
        self._original[id(changed)] = changed, prompt  # held, so that its id is nobody else's
        return changed

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


def shifted(prompt: Prompt) -> Prompt:
    """Every placeholder one token too early."""
    placeholders = tuple(dataclasses.replace(p, offset=p.offset - 1) for p in prompt.placeholders)
    return dataclasses.replace(prompt, placeholders=placeholders)


def mixed_up(prompt: Prompt) -> Prompt:
    """The first two images in the other order, where their size is one."""
    (first, second, *rest), places = prompt.images, prompt.placeholders
    if first.num_tokens != second.num_tokens:
        return prompt
    hashes = (second.hash, first.hash, *(image.hash for image in rest))
    placeholders = tuple(dataclasses.replace(p, hash=hash) for p, hash in zip(places, hashes, strict=True))
    return Prompt(prompt.token_ids, placeholders, (second, first, *rest))
