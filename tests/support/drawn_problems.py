"""Problems for tests of what happens after they are drawn."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from vlmrl.orchestrator.stream import Drawn, Indices
from vlmrl.trainer.loop_state import Cursor


def numbered(index: int, split: str = "train") -> Drawn:
    problem: Any = SimpleNamespace(id=f"{split}[{index}]")
    return Drawn(index, problem.id, problem)


class NumberedProblems:
    """Stands for a `ProblemStream` and for `FixedProblems`: every index has a problem, and none is made in a thread."""

    def __init__(self, first: int = 0, split: str = "train", num_rows: int | None = None) -> None:
        self.indices = Indices(Cursor(first))
        self.split = split
        self.chooser = None
        self.num_rows = num_rows

    async def draw(self, step: int, count: int) -> list[Drawn]:
        return [numbered(index, self.split) for index in self.indices.take(step, count)]

    def learn(self, step: int, groups: object) -> None:
        pass

    def metrics(self, step: int) -> dict[str, float]:
        return {}

    def passes(self, step: int) -> float | None:
        return None if self.num_rows is None else self.indices.cursor(step).learned / self.num_rows

    async def first(self, count: int, step: int = 0) -> list[Drawn]:
        return [numbered(index, self.split) for index in range(count)]
