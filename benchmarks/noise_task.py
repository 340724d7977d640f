"""The task of memory_4bit.py: one image of noise, another one for each problem, and a reward that means nothing."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlmrl import Env, Image, Message, Reply, Split, Task

QUESTION = "What is to be seen in this picture? Describe every part of it."


@dataclass(frozen=True)
class Picture:
    id: str
    seed: int
    side: int


class Look:
    def __init__(self, picture: Picture) -> None:
        self._picture = picture

    def reset(self) -> tuple[Message, ...]:
        random, side = np.random.default_rng(self._picture.seed), self._picture.side
        noise = random.integers(0, 256, (side, side, 3), np.uint8)
        return (Message.of("user", Image(noise), QUESTION),)

    def step(self, completion: str) -> Reply:
        return Reply(done=True, reward=zlib.crc32(completion.encode()) / 2**32)  # siblings differ


class Noise(Task):
    """`task.args.side`: pixels per side of an image."""

    def __init__(self, config: Any, *, seed: int) -> None:
        self._side = int(config.args["side"])

    def problem(self, split: Split, index: int) -> Picture:
        return Picture(f"{split} {index}", zlib.crc32(f"{split} {index}".encode()), self._side)

    def env(self, problem: Any) -> Env:
        return Look(problem)

    def texts(self) -> tuple[str, ...]:
        return (QUESTION,)
