"""Commands: typed records that rank 0 sends to the other ranks.

    rank 0: Sum(number=1) ── pickled ──▶ rank 1: Sum(number=1).run(worker) ── answer ──▶ rank 0

A command holds the input of one piece of work and says how to do that work. The code that leads a rank group defines
its own commands (vlmrl/trainer/commands.py), so this package knows none of them. The type checker sees the fields of
each command, the type of its answer, and a command without `run`:

    @dataclass(frozen=True)
    class Sum(Command[Calculator, float]):
        number: int

        def run(self, worker: Calculator) -> float:
            return worker.sum(self.number)

    _, answers = rank_group.together([Sum(1), Sum(2)], own=lambda: None)  # answers: list[float]
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

WorkerT = TypeVar("WorkerT", contravariant=True)
AnswerT = TypeVar("AnswerT", covariant=True)


class Command(ABC, Generic[WorkerT, AnswerT]):
    """One piece of work for one rank. Subclasses are frozen dataclasses that pickle can copy."""

    @abstractmethod
    def run(self, worker: WorkerT) -> AnswerT:
        """Do the work with `worker`, the state that the rank keeps between commands, and return the answer."""


@dataclass(frozen=True)
class Leave:
    """The run is over: the rank leaves the group."""


Message: TypeAlias = Command[Any, Any] | Leave
"""Everything that rank 0 sends."""
