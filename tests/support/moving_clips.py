"""A small task with videos: a bright square moves to the left or to the right. Every second problem shows a still
picture next to the video, and a second turn shows another video, at times of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from vlmrl.tasks.base import Reply
from vlmrl.types import Image, Message, Video

TIMES = (0.0, 0.25, 1.0, 1.5)
"""Seconds at which the frames of the second turn's video are shown."""
FPS = 3.0
"""Frames per second of the first turn's video, of which the model's processor chooses some."""


def clip(seed: int, frames: int) -> np.ndarray:
    """uint8 [frames, 64, 96, 3]; dark noise with a square that moves by eight pixels a frame."""
    made = np.random.default_rng(seed).integers(0, 64, (frames, 64, 96, 3), dtype=np.uint8)
    for number in range(frames):
        at = 4 + 8 * (number if seed % 2 else frames - 1 - number)
        made[number, 16:48, at : at + 24] = 255
    return made


@dataclass
class ClipsConfig:
    """No options."""


@dataclass(frozen=True)
class Clip:
    """One problem."""

    index: int

    @property
    def id(self) -> str:
        return f"clip {self.index}"


class ClipEnv:
    """One episode: two questions."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.turns = 0
        self.total = 0.0

    def reset(self) -> tuple[Message, ...]:
        frames = clip(self.index, 9)
        still: list[Any] = [] if self.index % 2 else [Image(frames[0]), " and "]
        return (Message.of("user", "Look: ", *still, Video(frames, fps=FPS), " Left or right?"),)

    def step(self, completion: str) -> Reply:
        self.turns += 1
        reward = float(completion == ("right" if self.index % 2 else "left"))
        self.total += reward / 2
        if self.turns == 2:
            return Reply(turn_reward=reward, done=True, reward=self.total)
        question = Message.of("user", "And now? ", Video(clip(self.index + 101, 4), times=TIMES))
        return Reply(turn_reward=reward, reward=self.total, messages=(question,))


class MovingClips:
    """The task."""

    def __init__(self, config: ClipsConfig, *, seed: int) -> None:
        """Problems depend on their index alone."""

    def problem(self, split: str, index: int) -> Clip:
        return Clip(index + (1000 if split == "eval" else 0))

    def num_rows(self, split: str) -> int | None:
        return None

    def env(self, problem: Clip) -> ClipEnv:
        return ClipEnv(problem.index)

    def demonstration(self, problem: Clip, *, random_answers: bool, seed: int) -> tuple[Message, ...]:
        answer = "right" if (seed if random_answers else problem.index) % 2 else "left"
        return (*self.env(problem).reset(), Message.of("assistant", answer))

    def texts(self) -> tuple[str, ...]:
        return ("Look:  and  Left or right? And now? left right <0.0 seconds>",)
