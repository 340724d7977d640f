"""The task of benchmarks/families.py: two turns, each with two pictures of noise, and a reward for any answer.

A model with random weights answers nothing right, so every reward of a real task would be 0 and so would the gradient.
Here the reward is a hash of the answer: siblings get different rewards, and a step has a gradient. Pictures of even
problems differ in size; those of odd problems do not, because transformers' own forward, with which the doctor
compares, takes images of one size only.

`task.args.pictures=0` leaves the pictures out, for models without a vision tower.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from vlmrl import Image, ImportedTaskConfig, Message, Reply, Split, Task

SIZES = (((64, 96), (80, 48)), ((64, 64), (64, 64)))
"""(height, width) of the two pictures of a turn, for even and for odd problems."""
TURNS = 2
ANSWERS = ("red", "green")
"""What the demonstrations of the two turns answer."""


@dataclass(frozen=True)
class Noise:
    """A problem: the seed of its pictures."""

    id: str
    seed: int
    pictures: int


class Env:
    """One attempt."""

    def __init__(self, problem: Noise) -> None:
        self._problem = problem
        self._turn = 0

    def question(self, turn: int) -> Message:
        random = np.random.default_rng((self._problem.seed, turn))
        sizes = SIZES[self._problem.seed % 2][: self._problem.pictures]
        pictures = [Image(random.integers(0, 256, (*size, 3), np.uint8)) for size in sizes]
        return Message.of("user", "What colour is it?", *pictures)

    def reset(self) -> tuple[Message, ...]:
        return (self.question(0),)

    def step(self, completion: str) -> Reply:
        self._turn += 1
        reward = hashlib.sha256(completion.encode()).digest()[0] / 255
        done = self._turn == TURNS
        return Reply(
            turn_reward=reward, reward=reward, done=done, messages=() if done else (self.question(self._turn),)
        )


class Pictures(Task):
    def __init__(self, config: ImportedTaskConfig, *, seed: int) -> None:
        self.seed = seed
        self.pictures: int = config.args.get("pictures", 2)

    def problem(self, split: Split, index: int) -> Noise:
        return Noise(
            f"{split} {index}", 10_000 * self.seed + (index if split == "train" else 5_000 + index), self.pictures
        )

    def env(self, problem: Noise) -> Env:
        return Env(problem)

    def demonstration(self, problem: Noise, *, random_answers: bool, seed: int) -> tuple[Message, ...]:
        env = Env(problem)
        turns = [(env.question(turn), Message.of("assistant", ANSWERS[turn])) for turn in range(TURNS)]
        return tuple(message for turn in turns for message in turn)

    def texts(self) -> tuple[str, ...]:
        return ("What colour is it?", *ANSWERS)
