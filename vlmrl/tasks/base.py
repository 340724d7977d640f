"""Task and Env: what a user writes for a task of their own.

    class Counting(vlmrl.tasks.Task):
        def problem(self, split, index): ...      # a dataset row; any object with an `id`
        def env(self, problem): ...               # a single-use interaction with it

    python -m vlmrl task=my_package.my_module:Counting task.args.level=3

An Env is driven like this, one completion at a time:

    messages = env.reset()                         # system + first user message, with images
    while True:
        completion = <the policy answers>
        reply = env.step(completion)               # score the turn; more messages or done
        if reply.done: break

Both run in a worker thread: they may block, they must not share mutable state between envs. An exception in
either ends that one rollout as `task_error`; a reward that is not finite ends it as `bad_reward`.
`vlmrl.tasks.check` runs this contract against your task and says what breaks it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

from vlmrl.types import Message

Split: TypeAlias = Literal["train", "eval"]


class Problem(Protocol):
    """One dataset row."""

    @property
    def id(self) -> str:
        """Names the problem in records; equal ids mean equal problems. The splits share no id."""
        ...


@dataclass(frozen=True)
class Reply:
    """The env's answer to one completion."""

    turn_reward: float
    """This turn's own reward; used where `algorithm.credit=turn`."""
    done: bool
    """The episode is over; `reward` is final."""
    reward: float = 0.0
    """The episode's reward so far; what counts when the episode ends here, by `done` or by a budget."""
    messages: tuple[Message, ...] = ()
    """What the policy sees next; must be non-empty unless `done`. User or tool messages only."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The task's own figures for the episode so far, e.g. `share_correct`."""


class Env(Protocol):
    """A single-use interaction with one problem."""

    def reset(self) -> tuple[Message, ...]:
        """The first prompt. Siblings of a group get equal messages."""
        ...

    def step(self, completion: str) -> Reply:
        """Score one completion (text, special tokens removed)."""
        ...


class Task(Protocol):
    """Problems with scoring. Deterministic: `problem(split, i)` is a function of the config, the seed and i."""

    def __init__(self, config: Any, *, seed: int) -> None: ...

    def problem(self, split: Split, index: int) -> Problem:
        """Problem number `index` (0, 1, 2, …, without end for "train") of a split."""
        ...

    def env(self, problem: Any) -> Env:
        """A fresh env."""
        ...

    def demonstration(self, problem: Any, *, random_answers: bool, seed: int) -> tuple[Message, ...]:
        """A whole conversation with assistant turns, for supervised steps. With `random_answers` it is in the
        answer's format and says nothing about the problem. Tasks that never warm up may raise NotImplementedError."""
        ...

    def texts(self) -> tuple[str, ...]:
        """Text that stands in the task's prompts and answers; a tiny tokenizer is trained on it."""
        ...
