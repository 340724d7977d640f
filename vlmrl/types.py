"""Every record on the data path, in the order in which the path makes them.

    Problem ─▶ Message ─▶ Prompt ─▶ Completion ─▶ Turn ─▶ Rollout ─▶ Group ─▶ TrainingSample ─▶ StepResult

This module knows nobody: numpy and the standard library only. Arrays state shape, dtype and off-value.
Letters: L tokens of a sample, P tokens of a prompt, C tokens of a completion, H × W pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

IntArray: TypeAlias = NDArray[np.int64]
FloatArray: TypeAlias = NDArray[np.float32]
BoolArray: TypeAlias = NDArray[np.bool_]


# ── messages ────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Text:
    """A text part of a message."""

    text: str


@dataclass(frozen=True, eq=False)
class Image:
    """An image part of a message, as a task hands it in: not decoded, not hashed yet.

    `source` is a `PIL.Image.Image`, a uint8 array [H, W, 3], encoded bytes (PNG, JPEG, …) or a path to a file.
    """

    source: Any


Part: TypeAlias = Text | Image


@dataclass(frozen=True)
class Message:
    """One message of a conversation. `content` keeps the order of text and images."""

    role: Literal["system", "user", "assistant", "tool"]
    content: tuple[Part, ...]

    @staticmethod
    def of(role: Literal["system", "user", "assistant", "tool"], *parts: Part | str) -> Message:
        """`Message.of("user", "Which colour? ", Image(pil))`: strings become `Text`."""
        return Message(role, tuple(Text(part) if isinstance(part, str) else part for part in parts))


# ── renderer: tokens and pixels ─────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class ImageItem:
    """One distinct image, decoded and processed once. Interned: one object per `hash` and process."""

    hash: str
    """Hex, 32 characters: SHA-256 of the RGB bytes and the size."""
    pixels: NDArray[np.uint8]
    """uint8 [H, W, 3], RGB, as decoded; what images/<hash>.png shows."""
    mm_kwargs: dict[str, np.ndarray]
    """The processor's output under the model's forward names, batched along dim 0:
    `pixel_values` float32 [patches, patch_dim], `image_grid_thw` int64 [1, 3] for Qwen-VL."""
    num_tokens: int
    """Placeholder tokens that the image takes: grid.prod() / merge² for Qwen-VL."""


@dataclass(frozen=True)
class Placeholder:
    """The run of image tokens of one image: `token_ids[offset : offset + length]`."""

    offset: int
    length: int
    hash: str


@dataclass(frozen=True, eq=False)
class Prompt:
    """What the renderer made of a conversation; goes as it is to the engine and to the trainer.

    Contract, asserted by `check_placeholders`: `placeholders[i]` belongs to `images[i]`, its length is
    `images[i].num_tokens`, runs do not overlap and stand in ascending order. The same image shown twice is two
    placeholders and the same `ImageItem` twice.
    """

    token_ids: IntArray
    """int64 [P]."""
    placeholders: tuple[Placeholder, ...]
    images: tuple[ImageItem, ...]


class ContractError(AssertionError):
    """Tokens and pixels disagree: a placeholder run without its image, or the other way round."""


def check_placeholders(length: int, placeholders: tuple[Placeholder, ...], images: tuple[ImageItem, ...]) -> None:
    """Assert the contract of `Prompt` on a sequence of `length` tokens. Raises `ContractError`.

    >>> check_placeholders(9, (Placeholder(5, 1, "ab"),), ())
    Traceback (most recent call last):
    vlmrl.types.ContractError: 1 placeholders but 0 images
    """
    if len(placeholders) != len(images):
        raise ContractError(f"{len(placeholders)} placeholders but {len(images)} images")
    end = 0
    for placeholder, image in zip(placeholders, images, strict=True):
        if placeholder.hash != image.hash:
            raise ContractError(f"placeholder at {placeholder.offset} is of image {placeholder.hash}, not {image.hash}")
        if placeholder.length != image.num_tokens:
            raise ContractError(
                f"placeholder at {placeholder.offset} has {placeholder.length} tokens, "
                f"but image {image.hash} has {image.num_tokens} features"
            )
        if placeholder.offset < end or placeholder.offset + placeholder.length > length:
            raise ContractError(
                f"placeholder at {placeholder.offset}+{placeholder.length} overlaps or leaves [0, {length})"
            )
        end = placeholder.offset + placeholder.length


def mm_token_type_ids(length: int, placeholders: tuple[Placeholder, ...]) -> IntArray:
    """int64 [length]; 1 on placeholder runs, 0 elsewhere. From the runs, never from token ids.

    >>> mm_token_type_ids(5, (Placeholder(1, 2, "ab"),)).tolist()
    [0, 1, 1, 0, 0]
    """
    types = np.zeros(length, np.int64)
    for placeholder in placeholders:
        types[placeholder.offset : placeholder.offset + placeholder.length] = 1
    return types


# ── inference ───────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class SamplingParams:
    """How to sample one completion. `temperature=0.0` is greedy."""

    max_new_tokens: int
    temperature: float
    stop_token_ids: tuple[int, ...]
    """Sampling one of these ends the completion; the token is part of it."""
    banned_token_ids: tuple[int, ...]
    """Logit −inf at every position, here and in the trainer, so that both know the same distribution."""
    seed: int
    """Below 2**63; the same seed, prompt and weights give the same completion whatever else is in the batch."""


@dataclass(frozen=True, eq=False)
class Completion:
    """What the engine sampled for one prompt. C ≥ 1."""

    token_ids: IntArray
    """int64 [C]; ends with a stop token iff `finish_reason` is "stop"."""
    logprobs: FloatArray
    """float32 [C]; natural log of the probability under the distribution that was sampled from."""
    versions: IntArray
    """int64 [C]; policy version that sampled each token."""
    finish_reason: Literal["stop", "length"]


class EngineSession(Protocol):
    """One rollout's hold on the engine: its turns stay together (prefix cache, replica)."""

    async def generate(self, prompt: Prompt, sampling: SamplingParams) -> Completion:
        """Sample one completion. Raises `EngineError` when the engine answered with an error for this request."""
        ...

    async def __aenter__(self) -> EngineSession: ...

    async def __aexit__(self, *exc: object) -> None: ...


class InferenceEngine(Protocol):
    """The sampler, as the orchestrator knows it."""

    async def start(self) -> None:
        """Bring the engine up; returns when it can answer."""
        ...

    async def stop(self) -> None:
        """Leave nothing running. May be called twice."""
        ...

    def session(self, rollout_id: str) -> EngineSession:
        """Open a rollout's session. An engine may batch until every open session has asked or closed."""
        ...

    def metrics(self) -> dict[str, float]:
        """Counters since the last call, e.g. `wire/bytes_sent`."""
        ...


@dataclass(frozen=True)
class WeightComparison:
    """The engine's weights against the trainer's."""

    compared: int
    """Weights of the engine that were compared; those of several servers all count."""
    differing: tuple[str, ...]
    """Names of those whose values are others."""
    unmatched: tuple[str, ...]
    """Names that only one of the two knows."""


class WeightSync(Protocol):
    """Publishes a policy version to the engine."""

    async def publish(self, version: int) -> None:
        """After this returns, every new token is sampled by `version`."""
        ...

    async def compare(self) -> WeightComparison:
        """Every weight in the engine against the trainer's, by SHA-256. Reads all of them: for finding out whether a
        set-up works. To be called after a `publish`, while nothing trains."""
        ...

    def close(self) -> None:
        """Leave nothing behind. May be called twice."""
        ...


# ── rollouts ────────────────────────────────────────────────────────────────────────────────────────────────


class StopReason(StrEnum):
    """Why a rollout ended. The first is `terminated`, the next three `truncated`, the rest are faults."""

    TERMINATED = "terminated"
    """The task said done."""
    MAX_TURNS = "max_turns"
    """The turn budget is spent before the task said done."""
    MAX_NEW_TOKENS = "max_new_tokens"
    """A completion ran into its token budget; there is no next turn after it."""
    CONTEXT_FULL = "context_full"
    """The next prompt (or prompt + completion) would not fit in the context; turns before it are kept."""
    IMAGE_ERROR = "image_error"
    """An image that cannot be decoded or processed."""
    TASK_ERROR = "task_error"
    """The task's code raised."""
    BAD_REWARD = "bad_reward"
    """The task returned a reward that is NaN, infinite or no number."""
    ENGINE_ERROR = "engine_error"
    """The engine answered this rollout's request with an error."""
    CONTRACT = "contract"
    """Tokens and pixels disagree on the way (`ContractError`)."""

    @property
    def is_truncated(self) -> bool:
        return self in (StopReason.MAX_TURNS, StopReason.MAX_NEW_TOKENS, StopReason.CONTEXT_FULL)

    @property
    def is_fault(self) -> bool:
        return not (self is StopReason.TERMINATED or self.is_truncated)


class DropReason(StrEnum):
    """Why a rollout was not learned from. Each is counted as `rollouts/dropped/<value>`."""

    FAULT = "fault"
    """Its `stop_reason` is a fault."""
    EMPTY = "empty"
    """Nothing was sampled (the first prompt did not fit, say)."""
    STRAY_IMAGE_TOKEN = "stray_image_token"
    """The policy sampled an image token: placeholders and features would disagree in the forward pass."""
    STALE = "stale"
    """A token is older than `orchestrator.max_staleness`."""
    GIBBERISH = "gibberish"
    """A rare token that was very unlikely. This and the next two only where `algorithm.filters` says `drop`."""
    REPETITION = "repetition"
    """A long row of tokens that were all but certain."""
    ZERO_ADVANTAGE = "zero_advantage"
    """Every advantage of the group is zero: no gradient."""


@dataclass(eq=False)
class Turn:
    """prompt + completion + reply."""

    prompt: Prompt
    completion: Completion
    text: str
    """The completion's text without special tokens; what the task scored."""
    messages: list[Message]
    """What was new in this turn's prompt: the first turn's system and user messages, later the env's reply."""
    branch: int
    """0-based; grows by one where the prompt could not extend the turn before it (bridge break)."""
    reward: float
    """This turn's own reward, in [0, 1] by custom; 0.0 where the task scores only the episode, and where the
    completion was cut."""
    advantage: float = 0.0
    """Filled by advantages.py; float per turn, broadcast over the completion's tokens."""
    learned: TokenMetrics | None = None
    """Filled by samples.py after the step: the trainer's view of the completion, C tokens. None where nothing was
    learned from it."""


@dataclass(eq=False)
class Rollout:
    """One episode, finished or not. Also the record of what went wrong with it."""

    rollout_id: str
    """`train/000012/03/07`: split, step, group in step, index in group. Greedy ones are `eval-greedy/…`."""
    problem_id: str
    index: int
    """0-based place in its group."""
    turns: list[Turn]
    reward: float
    """The episode's reward; 0.0 for a fault."""
    metrics: dict[str, float]
    """The task's own figures, e.g. `share_correct`; averaged over rollouts as `task/<key>`."""
    stop_reason: StopReason
    error: str | None = None
    """What the exception said, for faults."""
    dropped: DropReason | None = None
    seconds: float = 0.0
    filtered: tuple[DropReason, ...] = ()
    """What the filters that are on say about it, whether they drop it or not (orchestrator/filters.py)."""

    @property
    def num_branches(self) -> int:
        return self.turns[-1].branch + 1 if self.turns else 0


@dataclass(eq=False)
class Group:
    """The sibling rollouts of one problem."""

    problem_id: str
    rollouts: list[Rollout]


# ── samples ─────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class TrainingSample:
    """One branch of a rollout, flat; arrays of length L aligned by token."""

    rollout_id: str
    token_ids: IntArray
    """int64 [L]; the branch's last prompt plus its last completion."""
    mm_token_type_ids: IntArray
    """int64 [L]; 0 text, 1 image; from placeholders."""
    loss_mask: BoolArray
    """bool [L]; True on tokens sampled by this policy in this branch, never on environment tokens."""
    advantages: FloatArray
    """float32 [L]; 0.0 where loss_mask is False."""
    inference_logprobs: FloatArray
    """float32 [L]; natural log; 0.0 where loss_mask is False."""
    versions: IntArray
    """int64 [L]; policy version; -1 where loss_mask is False."""
    placeholders: tuple[Placeholder, ...]
    images: tuple[ImageItem, ...]

    def __post_init__(self) -> None:
        length = len(self.token_ids)
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, np.ndarray):
                assert value.shape == (length,), f"{f.name} has shape {value.shape}, not ({length},)"
        check_placeholders(length, self.placeholders, self.images)


# ── trainer ─────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class TokenMetrics:
    """What the trainer found at N loss tokens, before the step changed the weights."""

    trainer_logprobs: FloatArray
    """float32 [N]; natural log of the probability of the token, under the distribution that was sampled from."""
    entropies: FloatArray
    """float32 [N]; of that distribution, in nats."""


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, as the orchestrator sees it."""

    version: int
    """Policy version after the step."""
    metrics: dict[str, float] = field(default_factory=dict)
    """`loss`, `grad_norm`, `entropy`, `mismatch_kl/mean`, … (DESIGN.md's keys)."""
    tokens: Sequence[TokenMetrics] = field(default=(), compare=False)
    """Of the loss tokens of each sample, in the order of the samples and of their tokens."""


class Trainer(Protocol):
    """The learner, as the orchestrator knows it."""

    @property
    def version(self) -> int:
        """Optimizer steps contained in the weights."""
        ...

    def train_step(self, samples: list[TrainingSample], demonstrations: Sequence[TrainingSample] = ()) -> StepResult:
        """One optimizer step on `samples`, and on supervised `demonstrations` at their weight.

        Raises `NonFiniteLossError` before the weights are touched.
        """
        ...

    def logprobs(self, samples: Sequence[TrainingSample]) -> list[FloatArray]:
        """Natural log of the probability of each sample's loss tokens under the weights as they are, float32
        [its loss tokens]. Learns nothing."""
        ...

    def save(self, folder: str) -> Future[None]:
        """Copy model, optimizer and random state, and begin to write them into `folder`; the future ends with that."""
        ...

    def load(self, folder: str) -> None:
        """Restore what `save` wrote. Raises `CheckpointError`."""
        ...
