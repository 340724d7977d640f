"""What the doctor looks at: real rollouts, watched where they leave the renderer, where they reach the engine, and, if
the engine runs the trainer's own model, row by row in its forward passes.

    task ─▶ WatchedRenderer ─▶ WatchedEngine ─▶ Rollout ─▶ samples
            hashes, prompts    requests         Played

Nothing here judges; checks.py does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vlmrl.models.policy import Policy
from vlmrl.orchestrator.samples import make_samples
from vlmrl.rendering.images import decode, image_hash
from vlmrl.rendering.renderer import Renderer
from vlmrl.types import (
    BoolArray,
    Completion,
    EngineSession,
    FloatArray,
    Group,
    Image,
    ImageItem,
    InferenceEngine,
    IntArray,
    Message,
    Part,
    Prompt,
    Rollout,
    SamplingParams,
    TrainingSample,
)

# ── rollouts ────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class Rendered:
    """One prompt that the renderer made, and what went into it."""

    messages: tuple[Message, ...]
    """The new ones; their images as arrays of pixels, decoded before the renderer saw them."""
    prompt: Prompt
    is_first: bool
    """Of a first turn: nothing came before the messages."""

    @property
    def hashes(self) -> tuple[str, ...]:
        """Of the new images, in order."""
        return tuple(image_hash(part.source) for part in images_of(self.messages))


@dataclass(eq=False)
class Played:
    """The rollouts of one policy version."""

    groups: list[Group]
    rendered: list[Rendered]
    requests: list[Prompt]
    """What the engine was asked to continue, in the order of its answers."""
    rows: IntArray | None
    """int64 [rows, 1 + position rows]: token id and positions of every row that the engine computed; None where it
    does so elsewhere."""
    sampled: list[TrainingSample] = field(init=False)
    """At the run's temperature."""
    greedy: list[TrainingSample] = field(init=False)
    """At temperature 0."""

    def __post_init__(self) -> None:
        self.sampled = [s for rollout in self.rollouts() if not _is_greedy(rollout) for s in _samples(rollout)]
        self.greedy = [s for rollout in self.rollouts() if _is_greedy(rollout) for s in _samples(rollout)]

    def rollouts(self) -> list[Rollout]:
        return [rollout for group in self.groups for rollout in group.rollouts]

    def openings(self) -> list[tuple[Message, ...]]:
        """The distinct first messages that show an image."""
        found = {
            (each.prompt.token_ids.tobytes(), each.hashes): each.messages
            for each in self.rendered
            if each.is_first and each.prompt.images
        }
        return list(found.values())

    @property
    def samples(self) -> list[TrainingSample]:
        return self.sampled + self.greedy


def _is_greedy(rollout: Rollout) -> bool:
    return "-greedy/" in rollout.rollout_id


def _samples(rollout: Rollout) -> list[TrainingSample]:
    """Those of a rollout that went wrong later, too: its turns so far are evidence."""
    return make_samples(rollout) if rollout.turns else []


def images_of(messages: Sequence[Message]) -> list[Image]:
    return [part for message in messages for part in message.content if isinstance(part, Image)]


def with_images(messages: Sequence[Message], sources: Sequence[Any]) -> tuple[Message, ...]:
    """The messages with these images in place of theirs."""
    remaining = iter(sources)

    def other(part: Part) -> Part:
        return Image(next(remaining)) if isinstance(part, Image) else part

    return tuple(dataclasses.replace(m, content=tuple(map(other, m.content))) for m in messages)


def engine_logprobs(samples: Sequence[TrainingSample]) -> FloatArray:
    """float32 [loss tokens of all samples]; what the engine said."""
    return np.concatenate(
        [np.empty(0, np.float32), *(sample.inference_logprobs[sample.loss_mask] for sample in samples)]
    )


# ── watching ────────────────────────────────────────────────────────────────────────────────────────────────


class WatchedRenderer:
    """A `Renderer` that remembers what it made of what."""

    def __init__(self, renderer: Renderer) -> None:
        self._renderer = renderer
        self.rendered: list[Rendered] = []

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        return self._renderer.stop_token_ids

    @property
    def banned_token_ids(self) -> tuple[int, ...]:
        return self._renderer.banned_token_ids

    @property
    def image_token_ids(self) -> frozenset[int]:
        return self._renderer.image_token_ids

    async def first_turn(self, messages: Sequence[Message]) -> Prompt:
        seen = _decoded(messages)
        prompt = await self._renderer.first_turn(messages)
        self.rendered.append(Rendered(seen, prompt, is_first=True))
        return prompt

    async def next_turn(
        self, previous: Prompt, completion_ids: IntArray, history: Sequence[Message], new_messages: Sequence[Message]
    ) -> tuple[Prompt, bool]:
        seen = _decoded(new_messages)
        prompt, bridged = await self._renderer.next_turn(previous, completion_ids, history, new_messages)
        self.rendered.append(Rendered(seen, prompt, is_first=False))
        return prompt, bridged

    def images(self, parts: Sequence[Image]) -> tuple[ImageItem, ...]:
        return self._renderer.images(parts)

    def decode(self, completion_ids: IntArray) -> str:
        return self._renderer.decode(completion_ids)

    def render_conversation(self, messages: Sequence[Message]) -> tuple[Prompt, BoolArray]:
        return self._renderer.render_conversation(messages)


def _decoded(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Now, since an env may draw on its images later. Raises `ImageError`."""
    return with_images(messages, [decode(part.source) for part in images_of(messages)])


class WatchedEngine:
    """The engine of a run, which starts and stops it itself. Remembers the prompts, and calls every completion stopped:
    a policy that does not end its answers yet would have no second turn, and later turns bring images of their own."""

    def __init__(self, engine: InferenceEngine) -> None:
        self._engine = engine
        self.requests: list[Prompt] = []

    async def start(self) -> None:
        """It is up."""

    async def stop(self) -> None:
        """It goes on."""

    def session(self, rollout_id: str) -> _WatchedSession:
        return _WatchedSession(self._engine.session(rollout_id), self.requests)

    def metrics(self) -> dict[str, float]:
        return self._engine.metrics()


class _WatchedSession:
    def __init__(self, session: EngineSession, requests: list[Prompt]) -> None:
        self._session = session
        self._requests = requests

    async def __aenter__(self) -> _WatchedSession:
        await self._session.__aenter__()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._session.__aexit__(*exc)

    async def generate(self, prompt: Prompt, sampling: SamplingParams) -> Completion:
        completion = await self._session.generate(prompt, sampling)
        self._requests.append(prompt)
        return dataclasses.replace(completion, finish_reason="stop")


class ScriptedEngine:
    """Gives every prompt one answer: the tokens that the tokenizer itself makes of a text, so that the prompt after it
    is the chat template's of the same conversation."""

    def __init__(self, token_ids: IntArray) -> None:
        self._completion = Completion(
            token_ids, np.zeros(len(token_ids), np.float32), np.zeros(len(token_ids), np.int64), "stop"
        )

    async def start(self) -> None:
        """Nothing to bring up."""

    async def stop(self) -> None:
        """Nothing is running."""

    def session(self, rollout_id: str) -> ScriptedEngine:
        return self

    async def __aenter__(self) -> ScriptedEngine:
        return self

    async def __aexit__(self, *exc: object) -> None:
        """Nothing is held."""

    async def generate(self, prompt: Prompt, sampling: SamplingParams) -> Completion:
        return self._completion

    def metrics(self) -> dict[str, float]:
        return {}


@dataclass(eq=False)
class Rows:
    """What went through a model while it was watched."""

    batches: list[IntArray] = field(default_factory=list)

    def all(self) -> IntArray | None:
        """int64 [rows, 1 + position rows], each once; None where nothing did."""
        return np.unique(np.concatenate(self.batches), axis=0) if self.batches else None


@contextmanager
def watched_rows(policy: Policy) -> Iterator[Rows]:
    """Token ids and positions of every row that the policy's model computes meanwhile."""
    rows = Rows()
    looked_up: list[IntArray] = []

    def look_up(module: Any, args: tuple[Any, ...]) -> None:
        looked_up.append(args[0].reshape(1, -1).cpu().numpy())

    def look(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        token_ids = looked_up.pop()
        positions = kwargs["position_ids"].reshape(-1, token_ids.shape[1]).cpu().numpy()
        rows.batches.append(np.concatenate([token_ids, positions]).T)

    handles = [
        policy.model.get_input_embeddings().register_forward_pre_hook(look_up),
        policy.model.base_model.get_decoder().register_forward_pre_hook(look, with_kwargs=True),
    ]
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()
