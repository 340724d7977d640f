"""Rollouts that show videos, with drawn frames and tensors; no processor makes them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from support.rollout_builders import completion, image
from vlmrl.rendering.images import image_hash
from vlmrl.rendering.video_store import video_hash
from vlmrl.types import (
    Image,
    ImageItem,
    Message,
    MMItem,
    Placeholder,
    Prompt,
    Rollout,
    StopReason,
    Turn,
    Video,
    VideoItem,
)

TIMES = (0.0, 0.5, 1.25, 2.0)
"""Seconds, not at equal distances."""
VIDEO_TOKENS = 4
VIDEO_TOKEN = 98
GAP = ((2, 1),)
"""A token without a feature between the two halves of a video."""


def frames_of(seed: int, count: int = len(TIMES), side: int = 8) -> np.ndarray:
    """uint8 [count, side, side, 3]; random, so that no two frames are equal."""
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), np.uint8)


def video(seed: int, frames: np.ndarray | None = None, times: Sequence[float] = TIMES) -> VideoItem:
    """A video of `frames`, which are drawn from the seed where they are not given."""
    frames = frames_of(seed) if frames is None else frames
    hashes = tuple(image_hash(frame) for frame in frames)
    rate, shown = 1.5, np.array(times, np.float64)
    patches = frames.reshape(len(frames), -1).astype(np.float32) / 255
    tensors = {"pixel_values_videos": patches, "video_grid_thw": np.array([[2, 2, 4]])}
    return VideoItem(video_hash(hashes, shown, rate), frames, shown, rate, hashes, tensors, VIDEO_TOKENS)


def shown(items: Sequence[MMItem], last: Turn | None = None) -> Prompt:
    """A prompt that shows the items, one after the other, behind the prompt and the answer of the turn before."""
    ids = [] if last is None else [*last.prompt.token_ids.tolist(), *last.completion.token_ids.tolist()]
    places = [] if last is None else list(last.prompt.placeholders)
    for item in items:
        ids.append(7)
        if isinstance(item, ImageItem):
            places.append(Placeholder(len(ids), item.num_tokens, item.hash))
            ids += [99] * item.num_tokens
        else:
            places.append(Placeholder(len(ids), item.num_tokens + 1, item.hash, GAP, "video"))
            ids += [VIDEO_TOKEN, VIDEO_TOKEN, 6, VIDEO_TOKEN, VIDEO_TOKEN]
    earlier = () if last is None else last.prompt.mm_items
    return Prompt(np.array(ids, np.int64), tuple(places), (*earlier, *items))


def part_of(item: MMItem) -> Image | Video:
    """What a task supplies of the item."""
    if isinstance(item, ImageItem):
        return Image(item.pixels)
    return Video(item.frames, fps=item.rate, times=item.times.tolist())


def video_rollout(*turns: Sequence[MMItem], index: int = 0, step: int = 1) -> Rollout:
    """One turn per list of items; by default a video between two images, and then another video."""
    given = turns or ((image(10), video(1), image(20)), (video(2),))
    made: list[Turn] = []
    for number, items in enumerate(given):
        prompt = shown(items, made[-1] if made else None)
        message = Message.of("user", "Which?", *map(part_of, items))
        made.append(Turn(prompt, completion([200, 201, 202], index + number), "AB", [message], 0, 0.5, -0.25))
    return Rollout(
        rollout_id=f"train/{step:06d}/00/{index:02d}",
        problem_id="moving",
        index=index,
        turns=made,
        reward=0.5,
        metrics={},
        stop_reason=StopReason.TERMINATED,
    )


def digest(array: np.ndarray) -> str:
    """The digest of an array by the standard library: dtype, shape, and 16 characters of its SHA-256."""
    return f"{array.dtype}{list(array.shape)} {hashlib.sha256(array.tobytes()).hexdigest()[:16]}"
