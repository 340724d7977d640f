"""Builders of rollouts for tests: later turns extend earlier ones, and equal images are the same object."""

from __future__ import annotations

import hashlib
from functools import cache

import numpy as np

from vlmrl.types import (
    Completion,
    DropReason,
    Group,
    Image,
    ImageItem,
    Message,
    Placeholder,
    Prompt,
    Rollout,
    StopReason,
    Turn,
)

IMAGE_TOKENS = 2


@cache
def image(shade: int, size: int = 8) -> ImageItem:
    pixels = np.full((size, size, 3), shade, np.uint8)
    return ImageItem(hashlib.sha256(pixels.tobytes()).hexdigest()[:32], pixels, {}, IMAGE_TOKENS)


def prompt(text_ids: list[int], shades: list[int], before: Turn | None = None) -> Prompt:
    """`before`'s prompt and completion, then `text_ids`, then the images."""
    ids = [*before.prompt.token_ids, *before.completion.token_ids] if before else []
    placeholders = list(before.prompt.placeholders) if before else []
    images = list(before.prompt.images) if before else []
    ids += text_ids
    for shade in shades:
        placeholders.append(Placeholder(len(ids), IMAGE_TOKENS, image(shade).hash))
        images.append(image(shade))
        ids += [99] * IMAGE_TOKENS
    return Prompt(np.array(ids, np.int64), tuple(placeholders), tuple(images))


def completion(ids: list[int], seed: int = 0) -> Completion:
    logprobs = -np.random.default_rng(seed).exponential(size=len(ids)).astype(np.float32)
    return Completion(np.array(ids, np.int64), logprobs, np.full(len(ids), 3), "stop")


def turn(made: Prompt, shades: list[int], *, branch: int = 0, text: str = "AB", seed: int = 0, tokens: int = 3) -> Turn:
    messages = [Message.of("user", "Which?", *(Image(image(shade).pixels) for shade in shades))]
    sampled = completion(list(range(200, 200 + tokens)), seed)
    return Turn(made, sampled, text, messages, branch, reward=0.5, advantage=-0.25)


def rollout(index: int = 0, *, text_tokens: int = 4, tokens: int = 3, dropped: DropReason | None = None) -> Rollout:
    """Two turns in one branch; shades 10 and 20, then 30."""
    first = turn(prompt(list(range(text_tokens)), [10, 20]), [10, 20], seed=index, tokens=tokens)
    second = turn(prompt([7] * text_tokens, [30], first), [30], seed=index + 1, tokens=tokens)
    return Rollout(
        rollout_id=f"train/000001/00/{index:02d}",
        problem_id="red-green",
        index=index,
        turns=[first, second],
        reward=0.75,
        metrics={"share_correct": 0.5},
        stop_reason=StopReason.TERMINATED,
        dropped=dropped,
        seconds=0.25,
    )


def group(size: int = 2) -> Group:
    return Group("red-green", [rollout(index) for index in range(size)])
