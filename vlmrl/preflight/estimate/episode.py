"""How long an episode gets, without a tokenizer. An estimate, whose formula is

    tokens = Σ images (vision tokens + 2) + turns × (max_new_tokens + 10) + characters / 4

Vision tokens are exact: an image's sides are rounded to multiples of 32 pixels, scaled into the processor's bounds, and
each 32 × 32 pixels are one token; 2 tokens enclose them. 10 is what a chat template puts around a turn's messages. 4
characters per token is English under a large vocabulary; the tiny model's few hundred tokens, made for the task's own
words, take 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image as PILImage

from vlmrl.models.families.base import Family, ImageBounds
from vlmrl.preflight.estimate.vision import CHARACTERS_PER_TOKEN, TURN_FRAME
from vlmrl.tasks.base import Task
from vlmrl.types import Image, Message


@dataclass(frozen=True)
class EpisodeEstimate:
    """What a problem shows."""

    turns: int
    images: tuple[tuple[int, int], ...]
    """(width, height) in pixels of each image, those shown twice twice."""
    characters: int
    """Of all prompts and replies."""

    def tokens(
        self,
        max_new_tokens: int,
        family: Family,
        bounds: ImageBounds | None,
        characters_per_token: int = CHARACTERS_PER_TOKEN,
    ) -> int:
        """The longest that it gets (the formula at the top); images of an unknown processor count nothing."""
        shown = 0
        if bounds is not None:
            shown = sum(family.image_tokens(*size, bounds) + family.frame_tokens for size in self.images)
        return shown + self.turns * (max_new_tokens + TURN_FRAME) + math.ceil(self.characters / characters_per_token)


def play(task: Task, max_turns: int) -> EpisodeEstimate:
    """One training problem, answered with nothing, up to its end or `max_turns`."""
    env = task.env(task.problem("train", 0))
    messages, turns = list(env.reset()), 1
    while turns < max_turns:
        reply = env.step("")
        if reply.done:
            break
        messages += reply.messages
        turns += 1
    return EpisodeEstimate(turns, tuple(_images(messages)), sum(len(text) for text in _texts(messages)))


def _images(messages: list[Message]) -> list[tuple[int, int]]:
    return [_size(part.source) for message in messages for part in message.content if isinstance(part, Image)]


def _texts(messages: list[Message]) -> list[str]:
    return [part.text for message in messages for part in message.content if not isinstance(part, Image)]


def _size(source: Any) -> tuple[int, int]:
    """(width, height) of what a task hands in as an image, without decoding it."""
    import io

    if isinstance(source, np.ndarray):
        return source.shape[1], source.shape[0]
    if isinstance(source, PILImage.Image):
        return source.size
    with PILImage.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
        return image.size
