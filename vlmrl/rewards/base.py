"""What a reward term sees of a rollout, and what it returns.

    rollout ─▶ Attempt ─▶ Reward.score ─▶ 0.7 (its value) | None (it abstains) | Scored (a value with metrics)

A reward term is any object with the method `score`, which is called once per group with the attempts of its siblings.
A term that judges one attempt at a time is a function `(attempt) -> float | None`, which `PerAttempt` wraps:

    >>> import asyncio
    >>> shortness = PerAttempt(lambda attempt: 1 / (1 + len(attempt.completion)))
    >>> attempt = Attempt("train/000001/00/00", "row 0", (), "B", "B", reference="B", columns={}, images=())
    >>> asyncio.run(shortness.score([attempt]))
    [0.5]
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeAlias, TypeVar

from vlmrl.errors import UserFault, fenced
from vlmrl.types import Message, StopReason, Video


@dataclass(frozen=True)
class SeenImage:
    """The size of one image of a prompt, before and after the model's image processor. Boxes in an answer may refer to
    either; both count in pixels, upright."""

    width: int
    """Width of the original."""
    height: int
    processed_width: int
    """Width of what the model saw; equals `width` where the model family does not tell."""
    processed_height: int


@dataclass(frozen=True)
class Attempt:
    """One rollout as a reward term sees it."""

    rollout_id: str
    """`train/000012/03/07`; see `vlmrl.types.Rollout`."""
    problem_id: str
    prompt: tuple[Message, ...]
    """The conversation before the last answer: the messages of the problem and, in a task of several turns, the earlier
    answers and replies."""
    completion: str
    """The last answer, whole, without special tokens."""
    answer: str | None
    """The part of the completion that `extract` finds; None where it finds none."""
    reference: Any
    """The answer of the data; None where the row has none."""
    columns: Mapping[str, Any]
    """The other columns of the row; empty where the problem has none."""
    images: tuple[SeenImage, ...]
    """The images of the prompt, in order."""
    completion_ids: tuple[int, ...] = ()
    """The token ids of the last answer, special tokens included."""

    @property
    def shows_any(self) -> bool:
        """Whether the prompt shows an image or a video."""
        parts = (part for message in self.prompt for part in message.content)
        return bool(self.images) or any(isinstance(part, Video) for part in parts)


@dataclass(frozen=True)
class Scored:
    """The value of a term with metrics of its own."""

    value: float | None
    """None: the term abstains."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Logged as `task/<term>/<name>`."""


class RewardError(UserFault):
    """A reward term raised, or returned something of a wrong form."""

    stop_reason: ClassVar[StopReason] = StopReason.REWARD_ERROR


class BadValueError(RewardError):
    """A value or a metric of a reward term is not a finite number."""

    stop_reason: ClassVar[StopReason] = StopReason.BAD_REWARD


Score: TypeAlias = float | Scored | UserFault | None
"""What a term says of one attempt. A `UserFault` costs that rollout alone, while one that is raised costs the group."""


T = TypeVar("T")


class RunBlocking(Protocol):
    """Runs a call that may block in a thread, so that the event loop goes on with other rollouts. Code that hangs there
    must not keep an interrupted run from ending (`vlmrl.orchestrator.task_threads`)."""

    def __call__(self, call: Callable[[], T]) -> Awaitable[T]: ...


class Reward(Protocol):
    """A reward term."""

    async def score(self, attempts: Sequence[Attempt]) -> Sequence[Score]:
        """One score per attempt, in order. The attempts are the siblings of one group. Called for several groups at the
        same time."""
        ...


@dataclass(frozen=True)
class PerAttempt:
    """The reward term of a function that judges one attempt and does not block. An exception costs that rollout."""

    function: Callable[[Attempt], float | None]

    async def score(self, attempts: Sequence[Attempt]) -> Sequence[Score]:
        return [self._score(attempt) for attempt in attempts]

    def _score(self, attempt: Attempt) -> Score:
        try:
            with fenced("the reward", RewardError):
                return self.function(attempt)
        except UserFault as fault:
            return fault
