"""The task's problems, each once as it is and once with pictures of our own.

A task's images may hide what is wrong: squares of one colour look the same with their patches in any order, an image of
one token has only one place to stand, images of one size cannot be told apart by their grids. So the odd problems show
noise in several sizes instead: nothing in it is alike, none is square, and the last is rescaled by the processor.

Left out on purpose: images where the task shows none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np

from vlmrl.runs.doctor.evidence import images_of, with_images
from vlmrl.tasks.base import Env, Problem, Reply, Split, Task
from vlmrl.types import Message

SIZES = ((96, 64), (64, 160), (45, 100))
"""Height × width in pixels: small, for they come on top of the prompts that the context was chosen for."""

PER_MESSAGE = 2
"""Images of a message that become noise; the others stay."""


@dataclass(frozen=True)
class PicturedProblem:
    """A problem of the task, and where its pictures come from."""

    problem: Problem
    seed: int | None
    """None: the task's own."""

    @property
    def id(self) -> str:
        return self.problem.id if self.seed is None else f"{self.problem.id}_in_noise"


class PicturedTask:
    """A `Task`: problem 2 i is the given task's problem i, problem 2 i + 1 the same in noise."""

    def __init__(self, task: Task) -> None:
        self._task = task

    def problem(self, split: Split, index: int) -> PicturedProblem:
        return PicturedProblem(self._task.problem(split, index // 2), seed=index if index % 2 else None)

    def env(self, problem: PicturedProblem) -> Env:
        env = self._task.env(problem.problem)
        return env if problem.seed is None else PicturedEnv(env, problem.seed)

    def demonstration(self, problem: PicturedProblem, *, random_answers: bool, seed: int) -> tuple[Message, ...]:
        return self._task.demonstration(problem.problem, random_answers=random_answers, seed=seed)

    def texts(self) -> tuple[str, ...]:
        return self._task.texts()


class PicturedEnv:
    """An env whose images are looked away from."""

    def __init__(self, env: Env, seed: int) -> None:
        self._env = env
        self._noise = noise(seed)

    def reset(self) -> tuple[Message, ...]:
        return self._pictured(self._env.reset())

    def step(self, completion: str) -> Reply:
        reply = self._env.step(completion)
        return Reply(
            turn_reward=reply.turn_reward,
            done=reply.done,
            reward=reply.reward,
            messages=self._pictured(reply.messages),
            metrics=reply.metrics,
        )

    def _pictured(self, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        changed: list[Message] = []
        for message in messages:
            own: list[Any] = [part.source for part in images_of([message])]
            own[:PER_MESSAGE] = [next(self._noise) for _ in own[:PER_MESSAGE]]
            changed += with_images([message], own)
        return tuple(changed)


def noise(seed: int) -> Iterator[np.ndarray]:
    """Pictures without end, uint8 [H, W, 3]; a function of the seed."""
    random = np.random.default_rng(seed)
    return (random.integers(0, 256, (*SIZES[number % len(SIZES)], 3), np.uint8) for number in count())
