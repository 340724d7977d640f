"""The records of the data path, in the order in which they are made.

    Problem ─▶ Message ─▶ Prompt ─▶ Completion ─▶ Turn ─▶ Rollout ─▶ Group ─▶ TrainingSample ─▶ StepResult

This module imports only numpy and the standard library. Every array field states its shape, its dtype and its value
where it does not apply. Letters: L tokens of a sample, P tokens of a prompt, C tokens of a completion, H × W pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import pairwise
from typing import Any, ClassVar, Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

IntArray: TypeAlias = NDArray[np.int64]
FloatArray: TypeAlias = NDArray[np.float32]
BoolArray: TypeAlias = NDArray[np.bool_]


Modality: TypeAlias = Literal["image", "video"]


# ── messages ────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Text:
    """A text part of a message."""

    text: str


@dataclass(frozen=True, eq=False)
class Image:
    """An image part of a message as the task supplies it, before it is decoded and hashed.

    `source` is a `PIL.Image.Image`, a uint8 array [H, W, 3], encoded bytes (PNG, JPEG, …) or the path of a file.
    """

    modality: ClassVar[Modality] = "image"

    source: Any

    def __repr__(self) -> str:
        return f"Image({type(self.source).__name__})"


@dataclass(frozen=True, eq=False)
class Video:
    """A video part of a message as the task supplies it, before its frames are chosen, decoded and hashed.

    `source` is the path of a video file, its encoded bytes (MP4, WebM, …), a uint8 array [T, H, W, 3], or a sequence of
    T frames of one size, each of which is anything that `Image.source` may be. Without `fps` and `times`, the frames of
    an array or of a sequence are taken for sampled already: all of them are shown, one every 1 / `model.vlm.video.fps`
    seconds.
    """

    modality: ClassVar[Modality] = "video"

    source: Any
    fps: float | None = None
    """Frames per second of an array or of a sequence, from which frames are sampled as from a file."""
    times: Sequence[float] | None = None
    """For an array or a sequence: when each of its frames is shown, in seconds, ascending. All of them are shown, and
    `fps` is how many they are a second."""

    def __repr__(self) -> str:
        return f"Video({type(self.source).__name__})"


Part: TypeAlias = Text | Image | Video


@dataclass(frozen=True)
class ToolSpec:
    """A tool that a policy may call, as the prompt describes it."""

    name: str
    description: str
    parameters: Mapping[str, Any] = field(hash=False)
    """The JSON schema of the arguments: `{"type": "object", "properties": {…}, "required": […]}`."""


@dataclass(frozen=True)
class ToolCall:
    """One call of a tool, parsed from an answer.

    >>> ToolCall("zoom", {"image": 1, "box": [0, 0, 8, 8]}).name
    'zoom'
    """

    name: str
    arguments: Mapping[str, Any] = field(hash=False)
    """The arguments by name: a JSON object."""
    id: str = ""
    """Names the call where a chat format or a client does; empty elsewhere."""


@dataclass(frozen=True)
class BrokenCall:
    """A tool call that an answer began and that cannot be read."""

    text: str
    """What the policy wrote."""
    reason: str
    """What is wrong with it, as the end of a sentence: `is not valid JSON`."""


@dataclass(frozen=True)
class Answer:
    """A completion in its parts: what it says, its reasoning, and the tools that it calls."""

    text: str
    """The text outside of reasoning and tool calls."""
    reasoning: str = ""
    """The text inside of the family's reasoning tags; empty where there is none."""
    calls: tuple[ToolCall, ...] = ()
    broken: tuple[BrokenCall, ...] = ()


@dataclass(frozen=True)
class Message:
    """One message of a conversation. `content` keeps the order of texts, images and videos."""

    role: Literal["system", "user", "assistant", "tool"]
    content: tuple[Part, ...]
    tool_calls: tuple[ToolCall, ...] = ()
    """Calls of an assistant message, which the chat format writes behind its text. Empty where `content` holds the
    text of the calls, as the messages of a rollout do: what a policy wrote is never written in another way."""
    tool_call_id: str = ""
    """The `ToolCall.id` that a tool message replies to."""
    name: str = ""
    """The tool whose result a tool message holds."""
    reasoning: str = ""
    """Reasoning of an assistant message, which some chat formats write before its text."""

    @staticmethod
    def of(role: Literal["system", "user", "assistant", "tool"], *parts: Part | str) -> Message:
        """Make a message from its parts: `Message.of("user", "Which colour? ", Image(pil))`."""
        return Message(role, tuple(Text(part) if isinstance(part, str) else part for part in parts))


# ── renderer: tokens and pixels ─────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class ImageItem:
    """One distinct image, decoded and processed once. There is one object per `hash` and process."""

    modality: ClassVar[Modality] = "image"

    hash: str
    """SHA-256 of the RGB bytes and the size; the first 32 hex characters."""
    pixels: NDArray[np.uint8]
    """uint8 [H, W, 3]; RGB as decoded, the content of images/<hash>.png."""
    mm_kwargs: dict[str, np.ndarray]
    """The processor's outputs by the names of the model's forward arguments, batched along dim 0:
    `pixel_values` float32 [patches, patch_dim] and `image_grid_thw` int64 [1, 3] for Qwen-VL."""
    num_tokens: int
    """Number of image tokens, which is the number of image features; grid.prod() / merge² for Qwen-VL."""
    processed_size: tuple[int, int] | None = None
    """(width, height) in pixels of what the vision tower sees, after the processor resized the image. None where the
    model family does not tell."""
    replacement: str = ""
    """The text that the checkpoint's processor writes in place of the image: image tokens, and for some families row
    breaks and tile tags between them. Empty where the renderer does not use it (`orchestrator/renderer=template` does).
    """

    def without_picture(self) -> ImageItem:
        """As it is sent to another process that computes: without the pixels for people."""
        return replace(self, pixels=np.empty((0, 0, 3), np.uint8))

    def __repr__(self) -> str:
        return f"ImageItem({self.hash!r}, {self.num_tokens} tokens)"


@dataclass(frozen=True, eq=False)
class VideoItem:
    """One distinct video, sampled, decoded and processed once. There is one object per `hash` and process."""

    modality: ClassVar[Modality] = "video"

    hash: str
    """SHA-256 of the hashes of its frames and of their times; the first 32 hex characters."""
    frames: NDArray[np.uint8]
    """uint8 [T, H, W, 3]; the sampled frames, RGB as decoded."""
    times: NDArray[np.float64]
    """float64 [T]; when each frame is shown, in seconds from the beginning of the video, ascending."""
    rate: float
    """Sampled frames per second, on average over the video."""
    frame_hashes: tuple[str, ...]
    """The image hash of each of the T frames, by which records keep it: images/<hash>.png."""
    mm_kwargs: dict[str, np.ndarray]
    """The processor's outputs, as those of `ImageItem`: `pixel_values_videos` float32 [patches, patch_dim] and
    `video_grid_thw` int64 [1, 3] for Qwen-VL."""
    num_tokens: int
    """Number of video tokens, which is the number of video features."""
    processed_size: tuple[int, int] | None = None
    """(width, height) in pixels of each frame as the vision tower sees it; None where the family does not tell."""
    replacement: str = ""
    """The text that the checkpoint's processor writes in place of the video: video tokens, and for some families the
    time of each frame between them."""

    def without_picture(self) -> VideoItem:
        """As it is sent to another process that computes: without the frames for people."""
        return replace(self, frames=np.empty((0, 0, 0, 3), np.uint8))

    def __repr__(self) -> str:
        return f"VideoItem({self.hash!r}, {len(self.frames)} frames, {self.num_tokens} tokens)"


MMItem: TypeAlias = ImageItem | VideoItem
"""What a placeholder stands for."""


@dataclass(frozen=True)
class Placeholder:
    """The tokens that stand for one image or video, from its first image (video) token to its last: `token_ids[offset :
    offset + length]`.

    Some families write row breaks or tile tags between the image tokens of one image, or times between the frames of a
    video. `gaps` are these runs. Every other token of a placeholder gets one feature.

    Example: two rows of two image tokens (9) with a row break (8) between them, `[5, 9, 9, 8, 9, 9, 7]`.

    >>> place = Placeholder(1, 5, "ab", gaps=((2, 1),))
    >>> place.num_features, place.has_feature.tolist()
    (4, [True, True, False, True, True])
    """

    offset: int
    length: int
    hash: str
    gaps: tuple[tuple[int, int], ...] = ()
    """(start relative to `offset`, length) of each run of tokens that get no feature, in ascending order."""
    modality: Modality = "image"

    @property
    def num_features(self) -> int:
        """Number of tokens that get a feature, without the gaps. Equals `num_tokens` of the item."""
        return self.length - sum(length for _, length in self.gaps)

    @property
    def has_feature(self) -> BoolArray:
        """bool [length]; True on image and video tokens, False in gaps."""
        marks = np.ones(self.length, np.bool_)
        for start, length in self.gaps:
            marks[start : start + length] = False
        return marks


@dataclass(frozen=True, eq=False)
class Prompt:
    """A rendered conversation. Engine and trainer receive the same object, unchanged.

    Contract, asserted by `check_placeholders`: `placeholders[i]` belongs to `mm_items[i]`, has `mm_items[i].num_tokens`
    tokens that get a feature, and placeholders are in ascending order without overlap. An image that is shown twice has
    two placeholders, and its `ImageItem` is listed twice.
    """

    token_ids: IntArray
    """int64 [P]."""
    placeholders: tuple[Placeholder, ...]
    mm_items: tuple[MMItem, ...]

    @property
    def images(self) -> tuple[ImageItem, ...]:
        """The images among the items."""
        return tuple(item for item in self.mm_items if isinstance(item, ImageItem))

    @property
    def videos(self) -> tuple[VideoItem, ...]:
        """The videos among the items."""
        return tuple(item for item in self.mm_items if isinstance(item, VideoItem))

    @property
    def num_frames(self) -> int:
        """Frames of all its videos together; those of a video that is shown twice count twice."""
        return sum(len(video.frames) for video in self.videos)

    def __repr__(self) -> str:
        videos = f", {len(self.videos)} videos" if self.videos else ""
        return f"Prompt({len(self.token_ids)} tokens, {len(self.images)} images{videos})"


def extends(prompt: Prompt, previous: Prompt, completion_ids: IntArray) -> bool:
    """Whether `prompt` continues an earlier turn: it begins with the tokens and items of `previous`, then
    `completion_ids` (int64 [C]) as plain tokens. Only then can both turns be one training sample.

    >>> previous = Prompt(np.array([1, 2]), (), ())
    >>> extends(Prompt(np.array([1, 2, 7, 3]), (), ()), previous, np.array([7]))
    True
    """
    start, end = len(previous.token_ids), len(previous.token_ids) + len(completion_ids)
    shown = len(previous.placeholders)
    return (
        np.array_equal(prompt.token_ids[:start], previous.token_ids)
        and np.array_equal(prompt.token_ids[start:end], completion_ids)
        and prompt.placeholders[:shown] == previous.placeholders
        and all(placeholder.offset >= end for placeholder in prompt.placeholders[shown:])
    )


class ContractError(AssertionError):
    """Placeholder tokens and items do not match."""


def check_placeholders(length: int, placeholders: tuple[Placeholder, ...], items: tuple[MMItem, ...]) -> None:
    """Check the contract of `Prompt` for a sequence of `length` tokens. Raises `ContractError`.

    >>> check_placeholders(9, (Placeholder(5, 1, "ab"),), ())
    Traceback (most recent call last):
    vlmrl.types.ContractError: 1 placeholders but 0 images and videos
    """
    if len(placeholders) != len(items):
        raise ContractError(f"{len(placeholders)} placeholders but {len(items)} images and videos")
    end = 0
    for placeholder, item in zip(placeholders, items, strict=True):
        kind = item.modality
        if (placeholder.hash, placeholder.modality) != (item.hash, kind):
            raise ContractError(
                f"placeholder at {placeholder.offset} belongs to {placeholder.modality} {placeholder.hash}, not to "
                f"{kind} {item.hash}"
            )
        _check_gaps(placeholder)
        if placeholder.num_features != item.num_tokens:
            raise ContractError(
                f"placeholder at {placeholder.offset} has {placeholder.num_features} {kind} tokens, "
                f"but {kind} {item.hash} has {item.num_tokens} features"
            )
        if placeholder.offset < end or placeholder.offset + placeholder.length > length:
            raise ContractError(
                f"placeholder at {placeholder.offset}+{placeholder.length} overlaps another or leaves [0, {length})"
            )
        end = placeholder.offset + placeholder.length


def _check_gaps(placeholder: Placeholder) -> None:
    """Check that gaps are in ascending order, do not touch, and lie between tokens with a feature. Raises
    `ContractError`."""
    end = 0
    for start, length in placeholder.gaps:
        if length < 1 or start <= end or start + length >= placeholder.length:
            raise ContractError(
                f"placeholder at {placeholder.offset}+{placeholder.length} has a gap at {start}+{length}, which does "
                f"not lie between two of its {placeholder.modality} tokens"
            )
        end = start + length


TOKEN_TYPES: Mapping[Modality, int] = {"image": 1, "video": 2}
"""Values of `mm_token_type_ids`; 0 is text."""


def mm_token_type_ids(length: int, placeholders: tuple[Placeholder, ...]) -> IntArray:
    """int64 [length]; 1 on image tokens, 2 on video tokens, 0 elsewhere. Derived from placeholders and gaps, never from
    token ids.

    >>> mm_token_type_ids(7, (Placeholder(1, 5, "ab", gaps=((2, 1),)),)).tolist()
    [0, 1, 1, 0, 1, 1, 0]
    """
    types = np.zeros(length, np.int64)
    for placeholder in placeholders:
        marks = TOKEN_TYPES[placeholder.modality] * placeholder.has_feature
        types[placeholder.offset : placeholder.offset + placeholder.length] = marks
    return types


# ── inference ───────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class SamplingParams:
    """How to sample one completion. `temperature=0.0` is greedy decoding."""

    max_new_tokens: int
    temperature: float
    stop_token_ids: tuple[int, ...]
    """Sampling one of these tokens ends the completion; the token is part of the completion."""
    banned_token_ids: tuple[int, ...]
    """Their logits are −inf at every position, in the engine and in the trainer, so that both compute the same
    distribution."""
    seed: int
    """In [0, 2**63). Same seed, prompt and weights give the same completion, whatever else is in the batch."""
    top_p: float = 1.0
    """Nucleus sampling (arXiv 1904.09751), after the temperature, `min_p` and `top_k`: a token can be sampled if the
    tokens that are more probable have less than `top_p` of the probability together. 1.0 keeps every token."""
    top_k: int = 0
    """A token can be sampled if it is at least as probable as the k-th most probable one. 0 keeps every token."""
    stop: tuple[str, ...] = ()
    """Texts that end the completion: it ends with the token that completes one of them in its text. The token and all
    before it belong to the completion, as they were sampled. None of them is empty."""
    min_p: float = 0.0
    """A token can be sampled if it is at least `min_p` times as probable as the most probable one (arXiv 2407.01082),
    after the temperature and before `top_k` and `top_p`, as in vLLM. 0.0 keeps every token."""
    reports_support: bool = False
    """Whether the completion says for each token from which tokens it was sampled (`Completion.supports`), which is
    what training from a truncated distribution needs. At most `MAX_SUPPORT` tokens are kept then."""

    @property
    def truncates(self) -> bool:
        """Whether some tokens are ruled out. Greedy decoding has no distribution to truncate."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)


MAX_SUPPORT = 1024
"""Most tokens of a recorded support, apart from ties: where `top_p` and `min_p` alone would keep more, these are the
most probable ones, as with `top_k`. A sampled token then takes at most 4 KiB in memory."""


@dataclass(frozen=True, eq=False)
class Supports:
    """For each of n tokens, the tokens that it was sampled from: its support. K is the sum of their sizes.

    Example: the first token was one of 3 and 7, the second was sampled from the whole vocabulary, the third from 5.

    >>> supports = Supports.of([[3, 7], [], [5]])
    >>> supports.token_ids.tolist(), supports.offsets.tolist(), supports.sizes.tolist()
    ([3, 7, 5], [0, 2, 2, 3], [2, 0, 1])
    """

    token_ids: NDArray[np.int32]
    """int32 [K]; one support after the other, each in ascending order and without repetition."""
    offsets: IntArray
    """int64 [n + 1]; the support of token t is `token_ids[offsets[t] : offsets[t + 1]]`. An empty one stands for the
    whole vocabulary."""

    @staticmethod
    def of(supports: Iterable[Sequence[int] | NDArray[np.integer]]) -> Supports:
        """The record of one support per token."""
        arrays = [np.asarray(support, np.int32) for support in supports]
        ids = np.concatenate([np.empty(0, np.int32), *arrays])
        return Supports(ids, np.cumsum([0, *map(len, arrays)], dtype=np.int64))

    @staticmethod
    def joined(parts: Iterable[Supports]) -> Supports:
        """The supports of the tokens of all parts, one after another."""
        known = list(parts)
        sizes = np.concatenate([np.zeros(1, np.int64), *(each.sizes for each in known)])
        return Supports(np.concatenate([np.empty(0, np.int32), *(each.token_ids for each in known)]), sizes.cumsum())

    @property
    def sizes(self) -> IntArray:
        """int64 [n]; 0 for the whole vocabulary."""
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __repr__(self) -> str:
        return f"Supports({len(self)} tokens, {len(self.token_ids)} ids)"

    def take(self, where: IntArray) -> Supports:
        """The supports of the tokens `where`, int64 [m] → m supports.

        >>> Supports.of([[3, 7], [], [5]]).take(np.array([2, 0])).token_ids.tolist()
        [5, 3, 7]
        """
        sizes = self.sizes[where]
        offsets = np.concatenate([np.zeros(1, np.int64), sizes.cumsum()])
        index = np.repeat(self.offsets[where] - offsets[:-1], sizes) + np.arange(offsets[-1])
        return Supports(self.token_ids[index], offsets)

    def positions(self, token_ids: IntArray) -> IntArray:
        """For each of the n `token_ids`, int64 [n], its place in `self.token_ids` inside of its own support; −1 where
        the support is empty. Raises `ContractError` where a support lacks its token.

        >>> Supports.of([[3, 7], [], [5]]).positions(np.array([7, 1, 5])).tolist()
        [1, -1, 2]
        """
        owner = np.repeat(np.arange(len(self)), self.sizes)
        (found,) = np.nonzero(self.token_ids == token_ids[owner])
        places = np.full(len(self), -1, np.int64)
        places[owner[found]] = found
        missing = np.flatnonzero((places < 0) & (self.sizes > 0))
        if len(missing):
            first = int(missing[0])
            raise ContractError(
                f"token {int(token_ids[first])} at index {first} is none of the {int(self.sizes[first])} tokens that "
                "it was sampled from"
            )
        return places


@dataclass(frozen=True, eq=False)
class Completion:
    """The tokens that the engine sampled for one prompt. C ≥ 1."""

    token_ids: IntArray
    """int64 [C]; where `finish_reason` is "stop", the last one is a stop token, or it completes the stop string `stop`.
    The last token may go on behind that string."""
    logprobs: FloatArray
    """float32 [C]; natural log of each token's probability under the distribution that it was sampled from; NaN where
    no policy sampled it (mode=play)."""
    versions: IntArray
    """int64 [C]; the policy version that sampled each token; -1 where no policy did."""
    finish_reason: Literal["stop", "length"]
    """"stop": by a stop token or a stop string. "length": the token budget ran out before either."""
    stop: str | None = None
    """The stop string that ended it; None where a stop token or the budget did."""
    supports: Supports | None = None
    """From which tokens each of the C tokens was sampled. None: from the whole vocabulary, or not reported
    (`SamplingParams.reports_support`)."""

    def __repr__(self) -> str:
        return f"Completion({len(self.token_ids)} tokens, {self.finish_reason!r})"


@dataclass(frozen=True)
class TurnSampling:
    """How a completion was sampled, where a client wanted it otherwise than the run samples."""

    temperature: float | None = None
    """None: the run's own."""
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    """None: the seed that follows from the run's seed, the rollout and the turn (`sampling_seed`)."""

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def truncates(self) -> bool:
        """Whether tokens were ruled out by `top_p` or `top_k`, which are those of the turn."""
        return self.top_p != 1 or self.top_k != 0

    @property
    def reshapes(self) -> bool:
        """Whether the tokens may have come from another distribution than the run's, and not only from another seed."""
        return self.temperature is not None or self.truncates


class EngineSession(Protocol):
    """One rollout's session with the engine. Its turns go to the same replica and share its prefix cache."""

    async def generate(self, prompt: Prompt, sampling: SamplingParams) -> Completion:
        """Sample one completion. Raises `EngineError` when the engine reports an error for this request."""
        ...

    async def __aenter__(self) -> EngineSession: ...

    async def __aexit__(self, *exc: object) -> None: ...


class InferenceEngine(Protocol):
    """The interface of the sampler."""

    async def start(self) -> None:
        """Start the engine; returns when it can serve requests."""
        ...

    async def stop(self) -> None:
        """Stop the engine and every process that it started. May be called twice."""
        ...

    def session(self, rollout_id: str, *, is_awaited: bool = True) -> EngineSession:
        """Open the session of a rollout. An engine may wait with a batch until every awaited open session has sent a
        request or closed. A session whose requests come from a foreign program is not awaited, because the program may
        take any time between two requests; its requests may overlap."""
        ...

    def metrics(self) -> dict[str, float]:
        """Counters since the last call, e.g. `wire/bytes_sent`."""
        ...


@dataclass(frozen=True)
class WeightComparison:
    """Result of comparing the engine's weights with the trainer's."""

    compared: int
    """Number of weights of the engine that were compared, summed over its servers."""
    differing: tuple[str, ...]
    """Names of the weights whose values differ."""
    unmatched: tuple[str, ...]
    """Names that only one of the two has."""


class WeightSync(Protocol):
    """The interface that publishes policy versions to the engine."""

    async def publish(self, version: int) -> None:
        """Send the weights of `version`. After this returns, every new token is sampled by `version`."""
        ...

    async def compare(self) -> WeightComparison:
        """Compare every weight of the engine with the trainer's by SHA-256. This reads all weights, so only mode=doctor
        does it. Call it after a `publish`, while no step is trained."""
        ...

    def close(self) -> None:
        """Release all resources and temporary files. May be called twice."""
        ...


# ── rollouts ────────────────────────────────────────────────────────────────────────────────────────────────


class StopReason(StrEnum):
    """Why a rollout ended: terminated (the first), truncated (the next four) or a fault (the rest)."""

    TERMINATED = "terminated"
    """The task ended the episode."""
    MAX_TURNS = "max_turns"
    """The turn budget was used up before the task ended the episode."""
    MAX_NEW_TOKENS = "max_new_tokens"
    """A completion reached its token budget; it is the last turn."""
    CONTEXT_FULL = "context_full"
    """The next prompt (or prompt and completion) does not fit in the context; earlier turns are kept."""
    FRAMES_FULL = "frames_full"
    """The videos of the next prompt have more frames than `model.vlm.video.max_episode_frames`; earlier turns are
    kept."""
    IMAGE_ERROR = "image_error"
    """An image or a video cannot be decoded or processed."""
    TASK_ERROR = "task_error"
    """The task's code raised."""
    TASK_TIMEOUT = "task_timeout"
    """A call of the task's env did not return within `task.timeout_s`."""
    BAD_REWARD = "bad_reward"
    """The task or a reward term returned a reward that is NaN, infinite or not a number."""
    REWARD_ERROR = "reward_error"
    """A reward term raised, or returned something of a wrong form."""
    ENGINE_ERROR = "engine_error"
    """The engine reported an error for a request of this rollout."""
    CONTRACT = "contract"
    """Placeholder tokens and images do not match (`ContractError`)."""

    @property
    def is_truncated(self) -> bool:
        return self in (
            StopReason.MAX_TURNS,
            StopReason.MAX_NEW_TOKENS,
            StopReason.CONTEXT_FULL,
            StopReason.FRAMES_FULL,
        )

    @property
    def is_fault(self) -> bool:
        return not (self is StopReason.TERMINATED or self.is_truncated)


class DropReason(StrEnum):
    """Why a rollout is excluded from training. Each reason is counted as `rollouts/dropped/<value>`."""

    FAULT = "fault"
    """Its `stop_reason` is a fault."""
    EMPTY = "empty"
    """Nothing was sampled, for example because the first prompt did not fit in the context."""
    NO_REWARD = "no_reward"
    """The task has no reward of its own, and every reward term abstains, for example because the row has no answer."""
    STRAY_IMAGE_TOKEN = "stray_image_token"
    """The policy sampled an image token, so placeholders and features would not match in the forward pass."""
    STALE = "stale"
    """A token was sampled by weights that are more than `orchestrator.max_staleness` steps behind."""
    TRUNCATED = "truncated"
    """Its last answer was cut before it ended, and `algorithm.truncated=mask` leaves such rollouts out."""
    GIBBERISH = "gibberish"
    """It contains a rare, very unlikely token. This reason and the next two need `algorithm.filters.<name>=drop`."""
    REPETITION = "repetition"
    """It contains a long run of tokens with a probability of nearly 1."""
    ZERO_ADVANTAGE = "zero_advantage"
    """Every advantage of its group is zero, so there is no gradient."""


@dataclass(frozen=True, eq=False)
class TopTokens:
    """The k tokens that a model finds most likely in each of n places. All other tokens together are the *tail*."""

    ids: NDArray[np.int32]
    """int32 [n, k]; the most likely first."""
    logprobs: FloatArray
    """float32 [n, k + 1]; natural log of their probabilities, and in the last column of that of the tail. The
    probabilities of a row sum to 1."""

    def __getitem__(self, part: slice | NDArray[Any]) -> TopTokens:
        """Those of some of the places."""
        return TopTokens(self.ids[part], self.logprobs[part])

    @staticmethod
    def joined(parts: Sequence[TopTokens]) -> TopTokens:
        """Those of the places of all parts, one after another."""
        return TopTokens(np.concatenate([p.ids for p in parts]), np.concatenate([p.logprobs for p in parts]))

    def __repr__(self) -> str:
        return f"TopTokens{self.ids.shape}"


@dataclass(eq=False)
class Turn:
    """One exchange of an episode: prompt, completion, and the task's reward for it."""

    prompt: Prompt
    completion: Completion
    text: str
    """The completion's text without special tokens, up to the stop string that ended it; the task scored this text."""
    messages: list[Message]
    """The messages that are new in this turn's prompt: system and user messages in the first turn, the env's reply in
    later ones."""
    branch: int
    """0-based; grows by one where the prompt could not extend the turn before it (bridge break), and where the env
    replaced the conversation (`starts_over`)."""
    reward: float
    """This turn's own reward, usually in [0, 1]; 0.0 where the task scores only the whole episode, and at most 0.0
    where the completion was truncated and `algorithm.truncated=zero`."""
    advantage: float = 0.0
    """Filled by advantages.py, weighted by vision_advantage.py; one float per turn, broadcast over the completion's
    tokens."""
    learned: TokenMetrics | None = None
    """Filled by samples.py after the step: the trainer's logprobs and entropies of the C tokens of the completion. None
    where the turn was not trained on."""
    reference_logprobs: FloatArray | None = None
    """float32 [C]; natural log of the reference's probability of each token of the completion, filled by
    orchestrator/samples.py. None in a run without a reference, and where the turn cannot be learned from."""
    reference_top: TopTokens | None = None
    """The tokens that the reference finds most likely in each of the C places; None also with
    `algorithm.distill.top_k=0`."""
    starts_over: bool = False
    """Whether the env replaced the conversation before it (`Reply.history`). Then a new branch begins, and `messages`
    is all of its prompt."""
    tools: tuple[ToolSpec, ...] = ()
    """The tools that its prompt describes."""
    sampling: TurnSampling | None = None
    """How it was sampled where that differs from the run's own sampling. None: as the run samples."""
    token_advantages: FloatArray | None = None
    """float32 [C]; the advantage of each token of the completion, filled by gae.py; `advantage` is their mean. None:
    `advantage` is that of each."""
    returns: FloatArray | None = None
    """float32 [C]; what the value head is to predict before each token, filled by gae.py. None without it."""
    before: TokenMetrics | None = None
    """The trainer's metrics of the C tokens before the step, with values, filled by samples.py where advantages need
    them (`algorithm.advantage=gae`). None elsewhere, and where the turn cannot be learned from."""

    @property
    def is_learnable(self) -> bool:
        """Whether the loss can have its tokens. Greedy decoding rules all other tokens out, so nothing can be learned
        from what it gives. A truncated distribution can be learned where its supports are recorded; elsewhere the ratio
        of a token's probability under the trainer and under the sampler would be that of two distributions."""
        if self.sampling is None:
            return True
        return not self.sampling.is_greedy and (not self.sampling.truncates or self.completion.supports is not None)

    def __repr__(self) -> str:
        return f"Turn({self.prompt}, {self.completion}, reward={self.reward})"


@dataclass
class EnvTime:
    """Wall-clock time of a rollout's calls of its env."""

    resets: int = 0
    """Number of calls of `reset`, with `task.env` before it."""
    steps: int = 0
    """Number of calls of `step`."""
    reset_s: float = 0.0
    """Seconds of all resets."""
    step_s: float = 0.0
    """Seconds of all steps."""
    queue_s: float = 0.0
    """Seconds that these calls waited for a free thread or worker process."""


@dataclass
class ToolUse:
    """The tool calls of a rollout."""

    calls: int = 0
    """Calls, also those that could not be run."""
    broken: int = 0
    """Calls that could not be run: not readable, of no tool, or with arguments that do not fit."""
    errors: int = 0
    """Calls whose tool raised, returned something of a wrong form, or took too long."""
    timeouts: int = 0
    """Those of `errors` that took too long."""
    seconds: float = 0.0
    """Wall-clock seconds in which the rollout waited for its calls."""
    by_name: dict[str, int] = field(default_factory=dict)
    """Tool → its calls."""


@dataclass
class ChatUse:
    """How the requests of a rollout went that a foreign program played."""

    requests: int = 0
    """All of them."""
    repeated: int = 0
    """Those that got the answer of an equal request before them."""
    refused: int = 0
    """Those that got no answer: malformed, too long, after the last turn, or failed."""
    bridged: int = 0
    """Those whose prompt extends the sampled tokens of an earlier answer."""
    breaks: int = 0
    """Those that continue an answer, whose tokens could not be extended."""


@dataclass(frozen=True)
class Printed:
    """The ends of what a program printed while it played a rollout."""

    stdout: str
    stderr: str


@dataclass(eq=False)
class Rollout:
    """One episode, complete or not, with the reason why it ended."""

    rollout_id: str
    """`train/000012/03/07`: split, step, group in the step, index in the group. Greedy ones are `eval-greedy/…`."""
    problem_id: str
    index: int
    """0-based index in its group."""
    turns: list[Turn]
    reward: float
    """The episode's reward; 0.0 for a fault, and at most 0.0 in training for a cut answer with
    `algorithm.truncated=zero`."""
    metrics: dict[str, float]
    """The task's own metrics, e.g. `share_correct`; averaged over rollouts as `task/<key>`."""
    stop_reason: StopReason
    error: str | None = None
    """The exception's message, for faults."""
    dropped: DropReason | None = None
    """Why it is excluded from training; None where it is trained on."""
    seconds: float = 0.0
    """Wall-clock seconds from start to end, including waiting."""
    filtered: tuple[DropReason, ...] = ()
    """The enabled filters that match it, whether they drop or only track (orchestrator/filters.py)."""
    problem_index: int = 0
    """Index of its problem in the split, as given to `Task.problem`."""
    traceback: str | None = None
    """The formatted traceback, for faults whose code raised."""
    replayed: int = 0
    """How often it was played again because a server of the run or a worker process of envs was lost."""
    rewards: dict[str, float | None] = field(default_factory=dict)
    """The value of each reward term by its name, before its weight; None where it abstains. Empty without terms, and
    where the rollout was not scored."""
    task: str = ""
    """The name of its task in a mixture; empty in a run of one task."""
    reference: Any = None
    """The answer of the data, where the problem has one (`vlmrl.tasks.base.Reference`)."""
    env_time: EnvTime = field(default_factory=EnvTime)
    """Where the env's time went; all zero for a rollout that was read from a file."""
    tool_use: ToolUse | None = None
    """Its tool calls; None in a run without tools, and for a rollout that was read from a file."""
    chat_use: ChatUse | None = None
    """Its requests, where a foreign program played it; None for a rollout that was read from a file."""
    printed: Printed | None = None
    """What the program that played it has printed (task=program); None where no program did."""

    def __repr__(self) -> str:
        return f"Rollout({self.rollout_id!r}, {len(self.turns)} turns, {self.stop_reason})"

    @property
    def is_cut(self) -> bool:
        """Whether its last answer has no end, because its token budget or the context ran out."""
        return bool(self.turns) and self.turns[-1].completion.finish_reason == "length"

    @staticmethod
    def unplayed(rollout_id: str, split: str, problem_index: int, index: int) -> Rollout:
        """A rollout of a problem before its first turn. `problem_id` is a stand-in until the task has named the
        problem.

        >>> Rollout.unplayed("train/000001/00/00", "train", problem_index=7, index=0).problem_id
        'train[7]'
        """
        return Rollout(
            rollout_id=rollout_id,
            problem_id=f"{split}[{problem_index}]",
            index=index,
            turns=[],
            reward=0.0,
            metrics={},
            stop_reason=StopReason.TERMINATED,
            problem_index=problem_index,
        )

    @property
    def num_branches(self) -> int:
        return self.turns[-1].branch + 1 if self.turns else 0

    def messages_before(self, number: int) -> list[Message]:
        """The conversation before the messages of turn `number` (0-based): messages and answers of the turns before it,
        back to the last one that starts over. Empty where turn `number` starts over itself."""
        messages: list[Message] = []
        for turn, later in pairwise(self.turns[: number + 1]):
            if later.starts_over:
                messages = []
                continue
            messages += [*turn.messages, Message.of("assistant", turn.text)]
        return messages


@dataclass(eq=False)
class Group:
    """The sibling rollouts of one problem."""

    problem_id: str
    rollouts: list[Rollout]
    problem: Any = None
    """What `Task.problem` returned; None where that failed, and for a recorded group."""
    compares_equal: bool = False
    """Filled by advantages.py: whether all rewards that were compared with each other are equal, so that there is
    nothing to learn from. False where fewer than two rollouts count, and with `algorithm.advantage=none`."""


# ── samples ─────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class TrainingSample:
    """One branch of a rollout as flat arrays of length L, aligned by token."""

    rollout_id: str
    token_ids: IntArray
    """int64 [L]; the branch's last prompt followed by its last completion."""
    mm_token_type_ids: IntArray
    """int64 [L]; 0 text, 1 image, 2 video; derived from the placeholders."""
    loss_mask: BoolArray
    """bool [L]; True on tokens that this policy sampled in this branch, never on environment tokens."""
    advantages: FloatArray
    """float32 [L]; 0.0 where loss_mask is False."""
    inference_logprobs: FloatArray
    """float32 [L]; natural log of the sampling probability; 0.0 where loss_mask is False."""
    versions: IntArray
    """int64 [L]; policy version that sampled the token; -1 where loss_mask is False."""
    placeholders: tuple[Placeholder, ...]
    mm_items: tuple[MMItem, ...]
    temperatures: FloatArray | None = None
    """float32 [L]; the temperature above 0 that the token was sampled at. NaN for the run's own temperature, and where
    loss_mask is False. None: the run's own for all tokens."""
    reference_logprobs: FloatArray | None = None
    """float32 [L]; natural log of the reference's probability of the token; 0.0 where loss_mask is False. None: not
    scored by a reference."""
    before: TokenMetrics | None = None
    """The trainer's metrics of the loss tokens, in order, with the weights before the first optimizer step on the
    batch. None: not recorded, as before that step."""
    returns: FloatArray | None = None
    """float32 [L]; what the value head is to predict (`algorithm.advantage=gae`); 0.0 where loss_mask is False. None:
    no value is learned."""
    reference_top: TopTokens | None = None
    """The tokens that the reference finds most likely in the place of each loss token. None: not asked for."""
    supports: Supports | None = None
    """L supports: from which tokens each token was sampled; an empty one for the whole vocabulary, and where loss_mask
    is False. Then every logprob of the token, also the trainer's and the reference's, is that of the distribution over
    its support. None: the whole vocabulary for all tokens."""

    @property
    def images(self) -> tuple[ImageItem, ...]:
        """The images among the items."""
        return tuple(item for item in self.mm_items if isinstance(item, ImageItem))

    def __post_init__(self) -> None:
        length = len(self.token_ids)
        assert self.supports is None or len(self.supports) == length, f"{self.supports} do not fit {length} tokens"
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, np.ndarray):
                assert value.shape == (length,), f"{f.name} has shape {value.shape}, not ({length},)"
        if self.reference_top is not None:
            assert len(self.reference_top.ids) == self.loss_mask.sum(), "one row per loss token"
        check_placeholders(length, self.placeholders, self.mm_items)

    def __repr__(self) -> str:
        return f"TrainingSample({self.rollout_id!r}, {len(self.token_ids)} tokens)"


@dataclass(frozen=True, eq=False)
class PreferencePair:
    """Two answers to one prompt, one better than the other. An answer is one sample, or one per branch of its
    rollout."""

    pair_id: str
    chosen: tuple[TrainingSample, ...]
    """The better answer."""
    rejected: tuple[TrainingSample, ...]
    """The worse answer."""

    @property
    def samples(self) -> tuple[TrainingSample, ...]:
        """Both answers."""
        return (*self.chosen, *self.rejected)


# ── trainer ─────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class TokenMetrics:
    """The trainer's metrics of N loss tokens, computed with the weights before the step."""

    trainer_logprobs: FloatArray
    """float32 [N]; natural log of the token's probability under the trainer's distribution, with the temperature, the
    banned tokens and the supports of sampling applied."""
    entropies: FloatArray
    """float32 [N]; entropy of that distribution, in nats."""
    values: FloatArray | None = None
    """float32 [N]; the value of the state before the token, in units of the reward. None: the policy has no value
    head."""

    def __getitem__(self, part: slice) -> TokenMetrics:
        """Those of some of the tokens."""
        values = None if self.values is None else self.values[part]
        return TokenMetrics(self.trainer_logprobs[part], self.entropies[part], values)

    @staticmethod
    def joined(parts: Sequence[TokenMetrics]) -> TokenMetrics:
        """Those of the tokens of at least one part, one after another."""
        values = [part.values for part in parts if part.values is not None]
        return TokenMetrics(
            np.concatenate([part.trainer_logprobs for part in parts]),
            np.concatenate([part.entropies for part in parts]),
            np.concatenate(values) if len(values) == len(parts) else None,
        )

    def __repr__(self) -> str:
        return f"TokenMetrics({len(self.entropies)} tokens)"


@dataclass(frozen=True, eq=False)
class ReferenceScores:
    """What the reference (`reference=`) says about N loss tokens."""

    logprobs: FloatArray
    """float32 [N]; natural log of its probability of the token, with the temperature and the banned tokens of
    sampling applied."""
    top: TopTokens | None = None
    """The tokens that it finds most likely in these places; None with `algorithm.distill.top_k=0`."""

    def __repr__(self) -> str:
        return f"ReferenceScores({len(self.logprobs)} tokens)"


@dataclass(frozen=True)
class StepResult:
    """The result of one RL step: the optimizer steps on one batch."""

    version: int
    """Policy version after the step."""
    metrics: dict[str, float] = field(default_factory=dict)
    """`loss`, `grad_norm`, `entropy`, `mismatch_kl/mean`, …; record/step_keys.py explains each key."""
    tokens: Sequence[TokenMetrics] = field(default=(), compare=False)
    """One per sample, in the order of the samples; its arrays are in the order of the sample's loss tokens."""


class Trainer(Protocol):
    """The interface of the trainer."""

    @property
    def version(self) -> int:
        """RL steps contained in the weights; each has one batch and one or more optimizer steps."""
        ...

    def train_step(
        self, samples: list[TrainingSample], demonstrations: Sequence[TrainingSample] = (), steps: float | None = None
    ) -> StepResult:
        """Take the optimizer steps of one batch (`algorithm.epochs`, `algorithm.minibatches`) on `samples` and on
        supervised `demonstrations`, at `trainer.warmup.rl_weight`. The learning rate decays over `steps`, by default
        over `trainer.max_steps`.

        Raises `NonFiniteLossError` before an optimizer step changes the weights.
        """
        ...

    def logprobs(self, samples: Sequence[TrainingSample]) -> list[FloatArray]:
        """For each sample, float32 [loss tokens]: natural log of the probability of its loss tokens under the current
        weights. Does not change the weights."""
        ...

    def token_metrics(self, samples: Sequence[TrainingSample]) -> list[TokenMetrics]:
        """The metrics of each sample's loss tokens under the current weights, with values where the policy has a value
        head. Does not change the weights."""
        ...

    def reference_scores(self, samples: Sequence[TrainingSample]) -> list[ReferenceScores]:
        """The scores of the reference for each sample's loss tokens; only in a run that has a reference."""
        ...

    def save(self, folder: str) -> Future[None]:
        """Copy model, optimizer and random state, then write them into `folder` in the background. The future completes
        when they are written."""
        ...

    def load(self, folder: str) -> None:
        """Restore what `save` wrote. Raises `CheckpointError`."""
        ...
