"""The task's problems, each once as it is and once with noise in place of its images and videos.

A task's own images can hide a fault: a square of one colour looks the same with its patches in any order, an image of
one token has only one position, and images of equal size have equal grids. So every odd problem shows noise in several
sizes instead: no two parts of it are equal, no size is square, and the processor rescales the last one. A video
becomes an odd number of noise frames at times of unequal distances, because frames that follow each other look alike.

Left out on purpose: adding images or videos where the task shows none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np

from vlmrl.config.model import VLMConfig
from vlmrl.runs.doctor.evidence import media_of, with_media
from vlmrl.tasks.base import Problem, Reply, Split, StepInfo, Task
from vlmrl.tasks.border import get_num_rows
from vlmrl.tasks.open_env import OpenEnv, finished
from vlmrl.types import Image, Message, Video

SIZES = ((96, 64), (64, 160), (45, 100))
"""Height × width in pixels. Small, because the run chose its context length for the task's own images."""

NOISE_PER_MESSAGE = 2
"""Images and videos of a message that become noise; the others stay."""

VIDEO_TIMES = (0.0, 0.25, 1.0, 1.5, 3.0)
"""Seconds at which the frames of a noise video are shown."""


@dataclass(frozen=True)
class NoiseProblem:
    """A problem of the task, with its own images and videos or with noise."""

    problem: Problem
    seed: int | None
    """Seed of the noise; None: the task's own images and videos."""

    @property
    def id(self) -> str:
        return self.problem.id if self.seed is None else f"{self.problem.id}_in_noise"


class NoiseTask:
    """A `Task` whose problem 2i is the given task's problem i, and whose problem 2i + 1 is the same in noise."""

    def __init__(self, task: Task, vlm: VLMConfig | None = None) -> None:
        """`vlm` bounds the frames of a noise video."""
        self._task = task
        most = len(VIDEO_TIMES) if vlm is None or vlm.video is None else vlm.video.max_frames
        self._times = VIDEO_TIMES[:most]

    def problem(self, split: Split, index: int) -> NoiseProblem:
        return NoiseProblem(self._task.problem(split, index // 2), seed=index if index % 2 else None)

    def num_rows(self, split: Split) -> int | None:
        rows = get_num_rows(self._task, split)
        return None if rows is None else 2 * rows

    def env(self, problem: NoiseProblem) -> Any:
        if problem.seed is None:
            return self._task.env(problem.problem)
        return NoiseEnv(OpenEnv(self._task, problem.problem), problem.seed, self._times)

    def demonstration(self, problem: NoiseProblem, *, random_answers: bool, seed: int) -> tuple[Message, ...]:
        return self._task.demonstration(problem.problem, random_answers=random_answers, seed=seed)

    def texts(self) -> tuple[str, ...]:
        return self._task.texts()


class NoiseEnv:
    """An env that shows noise in place of its images and videos."""

    def __init__(self, env: OpenEnv, seed: int, times: Sequence[float]) -> None:
        """`times`: seconds at which the frames of a noise video are shown."""
        self._env = env
        self._noise = noise(seed)
        self._times = times

    def reset(self) -> tuple[Message, ...]:
        return self._in_noise(finished(self._env.reset()))

    def step(self, completion: str, info: StepInfo) -> Reply:
        reply = finished(self._env.step(completion, info))
        return Reply(
            turn_reward=reply.turn_reward,
            done=reply.done,
            reward=reply.reward,
            messages=self._in_noise(reply.messages),
            metrics=reply.metrics,
            history=None if reply.history is None else self._in_noise(reply.history),
        )

    def close(self) -> None:
        finished(self._env.close())

    def _in_noise(self, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        changed: list[Message] = []
        for message in messages:
            media = media_of([message])
            media[:NOISE_PER_MESSAGE] = [
                _in_noise(part, next(self._noise), self._times) for part in media[:NOISE_PER_MESSAGE]
            ]
            changed += with_media([message], media)
        return tuple(changed)


def _in_noise(part: Image | Video, first: np.ndarray, times: Sequence[float]) -> Image | Video:
    """An image or a video of noise; `first` is the image, or the first frame of the video."""
    if isinstance(part, Image):
        return Image(first)
    return Video([np.roll(first, number, (0, 1, 2)) for number in range(len(times))], times=times)


class TwoTurns:
    """A `Task` of the doctor's own: two turns with noise in three sizes, two images and then one."""

    def problem(self, split: Split, index: int) -> TwoTurnsEnv:
        return TwoTurnsEnv(index)

    def num_rows(self, split: Split) -> int | None:
        return None

    def env(self, problem: TwoTurnsEnv) -> TwoTurnsEnv:
        return TwoTurnsEnv(problem.index)

    def demonstration(self, problem: TwoTurnsEnv, *, random_answers: bool, seed: int) -> tuple[Message, ...]:
        raise NotImplementedError("the doctor's own task has no demonstrations")

    def texts(self) -> tuple[str, ...]:
        return ()


class TwoTurnsEnv:
    """One conversation of `TwoTurns`, and its problem."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.id = f"two_turns_{index}"
        self._noise = noise(index)
        self._is_over = False

    def reset(self) -> tuple[Message, ...]:
        first, second = Image(next(self._noise)), Image(next(self._noise))
        return (Message.of("user", first, "What is this, and this?", second),)

    def step(self, completion: str) -> Reply:
        done, self._is_over = self._is_over, True
        return Reply(done=done, messages=(Message.of("user", "And ", Image(next(self._noise)), " this?"),))


def noise(seed: int) -> Iterator[np.ndarray]:
    """Endless noise images, uint8 [H, W, 3]; a function of the seed."""
    random = np.random.default_rng(seed)
    return (random.integers(0, 256, (*SIZES[number % len(SIZES)], 3), np.uint8) for number in count())
