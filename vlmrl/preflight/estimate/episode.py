"""Estimate how many tokens an episode takes, without a tokenizer:

    tokens = Σ images, videos (vision tokens + 2) + times of videos + turns × (max_new_tokens + 10) + characters / 4

The family counts the vision tokens of an image exactly (for Qwen3-VL, one token per 32 × 32 pixels after the image
processor has rounded and scaled the sides), and 2 tokens enclose them. A video has those of each pair of frames.
Qwen3-VL writes a time before each pair, and 2 tokens enclose the pair. A chat template puts about 10 tokens around the
messages of a turn. A token of a large vocabulary holds about 4 characters of English; one of the tiny model's few
hundred tokens, which are trained on the task's own words, holds 2.

A program that plays its problem itself (task=program) is not started for this. The images and texts of its rows count,
and its own prompts do not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from vlmrl.config.model import VideoConfig
from vlmrl.errors import UserFault
from vlmrl.models.families.base import Family, ImageBounds
from vlmrl.preflight.estimate.sizes import CHARACTERS_PER_TOKEN, TURN_FRAME
from vlmrl.rendering.images import decode
from vlmrl.rendering.video_files import open_video
from vlmrl.rendering.videos import decode_file, decode_frames, is_encoded
from vlmrl.tasks.base import BadRow, NoProblem, Split, StepInfo, Task
from vlmrl.tasks.border import get_problem
from vlmrl.tasks.open_env import OpenEnv, finished
from vlmrl.tasks.programs.problems import played_outside
from vlmrl.types import Image, IntArray, Message, Text, Video


@dataclass(frozen=True)
class EpisodeEstimate:
    """Turns, images and text of the longest conversation of one problem. An episode has several where its env replaces
    the conversation (`Reply.history`)."""

    turns: int
    images: tuple[tuple[int, int], ...]
    """(width, height) in pixels of each image; an image that is shown twice counts twice."""
    characters: int
    """Characters of all prompts and replies together."""
    conversations: int = 1
    """How many the episode has; each is a sample of its own."""
    videos: tuple[tuple[int, int, int], ...] = ()
    """(frames that are shown, width, height) of each video, as `images`."""

    @property
    def pixels(self) -> int:
        """Pixels of all images, and of all frames of all videos."""
        return sum(width * height for width, height in self.images) + sum(map(math.prod, self.videos))

    def tokens(
        self,
        max_new_tokens: int,
        family: Family,
        bounds: ImageBounds | None,
        characters_per_token: int = CHARACTERS_PER_TOKEN,
        video_bounds: ImageBounds | None = None,
    ) -> int:
        """The most tokens that the episode takes, by the formula at the top. Without `bounds` images count 0 tokens,
        and videos without `video_bounds`."""
        shown = 0
        if bounds is not None:
            shown = sum(family.image_tokens(*size, bounds) + family.frame_tokens for size in self.images)
        if video_bounds is not None:
            shown += sum(family.video_tokens(*video, video_bounds) + family.frame_tokens for video in self.videos)
            if family.writes_times:
                pairs = sum(math.ceil(frames / 2) for frames, *_ in self.videos)
                shown += pairs * (
                    family.frame_tokens + math.ceil(TIME_TOKENS * CHARACTERS_PER_TOKEN / characters_per_token)
                )
        return shown + self.turns * (max_new_tokens + TURN_FRAME) + math.ceil(self.characters / characters_per_token)


TIME_TOKENS = 7
"""Tokens of `<12.5 seconds>` in a large vocabulary."""

SAMPLES = 8
"""Problems that are tried until one can be played."""

FEWEST_FRAMES = 4
"""`min_frames` of Qwen's video processors."""

INDICES = 256
"""Indices that are looked at for those problems; an index may have none."""


def play(
    task: Task, max_turns: int, split: Split = "train", video: VideoConfig | None = None
) -> tuple[EpisodeEstimate, list[str]]:
    """Play the first problem of a split that can be played, with empty answers, until it ends or `max_turns` are
    reached. `video` says how videos are sampled; None where the model takes none, and then they are not looked at.

    Returns what was wrong before it, too: each fault costs a run one rollout, each bad row only itself. Raises
    `UserFault` where none of the first `SAMPLES` problems can be played, or where there is none.
    """
    called = "training" if split == "train" else "held-out"
    notes: list[str] = []
    faults: list[str] = []
    bad_rows: list[str] = []
    for index in range(INDICES):
        try:
            return _played(task, split, index, max_turns, video), notes
        except BadRow as bad:
            bad_rows.append(str(bad))
            notes.append(f"{called} index {index} has no problem ({bad}); a run takes the next one")
        except NoProblem:
            continue
        except UserFault as fault:
            faults.append(f"{called} problem {index}: {fault.text}")
            notes.append(f"{faults[-1]}; in a run it costs one rollout")
            if len(faults) == SAMPLES:
                break
    none = f"the {called} split has no problem at its first {INDICES} indices"
    raise UserFault(next(iter([*faults, *bad_rows]), none))


def _played(task: Task, split: Split, index: int, max_turns: int, video: VideoConfig | None) -> EpisodeEstimate:
    problem, _ = get_problem(task, split, index)
    if (outside := played_outside(problem)) is not None:
        return _estimate(max_turns, list(outside.messages), 1, video)
    with OpenEnv(task, problem) as env:
        first = finished(env.reset())
        conversations = [(list(first), 1)]
        for turn in range(1, max_turns):
            reply = finished(env.step("", StepInfo.of_text("", turn)))
            if reply.done:
                break
            if reply.history is not None:
                answers = sum(message.role == "assistant" for message in reply.history)
                conversations.append((list(reply.history), answers + 1))
            else:
                messages, turns = conversations[-1]
                conversations[-1] = ([*messages, *reply.messages], turns + 1)
    found = [_estimate(turns, messages, len(conversations), video) for messages, turns in conversations]
    return max(found, key=lambda one: (len(one.images) + len(one.videos), one.characters, one.turns))


def _estimate(turns: int, messages: list[Message], conversations: int, video: VideoConfig | None) -> EpisodeEstimate:
    videos = () if video is None else tuple(_videos(messages, video))
    characters = sum(map(len, _texts(messages)))
    return EpisodeEstimate(turns, tuple(_images(messages)), characters, conversations, videos)


def _images(messages: list[Message]) -> list[tuple[int, int]]:
    return [_size(part.source) for message in messages for part in message.content if isinstance(part, Image)]


def _texts(messages: list[Message]) -> list[str]:
    return [part.text for message in messages for part in message.content if isinstance(part, Text)]


def _videos(messages: list[Message], config: VideoConfig) -> Iterator[tuple[int, int, int]]:
    """(frames that are shown, width, height) of each video. Decodes them, each source once. Raises `VideoError`."""
    known: dict[Video, tuple[int, int, int]] = {}
    for part in (part for message in messages for part in message.content if isinstance(part, Video)):
        if part not in known:
            choose = partial(_chosen, config)
            if is_encoded(part.source):
                with open_video(part.source) as file:
                    clip = decode_file(part, file, choose, config.max_frames)
            else:
                clip = decode_frames(part, choose, config.fps, config.max_frames)
            count, height, width, _ = clip.frames.shape
            known[part] = count, width, height
        yield known[part]


def _chosen(config: VideoConfig, total: int, rate: float) -> IntArray:
    """Which frames are shown, by the rule of Qwen3-VL, from which those of other families differ by one frame."""
    count = config.num_frames or max(FEWEST_FRAMES, int(total / rate * config.fps))
    return np.linspace(0, total - 1, min(count, total)).round().astype(np.int64)


def _size(source: Any) -> tuple[int, int]:
    """(width, height) of an image as a task hands it in. Raises `ImageError`."""
    height, width = decode(source).shape[:2]
    return width, height
