"""difficulty.parquet: how often a run's rollouts solved each problem that it has played.

    problem_id                   solved  attempts  solved_before  attempts_before  last
    train.parquet:417:9f31c2aa   3       8         1              8                1043

The pass rate of a problem is that of its last two groups, here 4 of 16, so that it follows a policy that learns and
reaches 0 and 1. `last` is the index at which the problem was played last, −1 where an evaluation or another run has
played it. The file is in the checkpoints of runs with `task.curriculum`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

MAX_PROBLEMS = 1 << 20
"""Problems that are remembered: about 30 MB of a checkpoint. With more, those that were not played for longest are
forgotten, and count as never played."""

DIFFICULTY = "difficulty.parquet"
"""The name of the file."""


class Attempts(NamedTuple):
    """What is known of one problem."""

    solved: int
    attempts: int
    """Rollouts of the last group."""
    solved_before: int = 0
    attempts_before: int = 0
    """Rollouts of the group before it; 0 where there was none."""
    last: int = -1

    @property
    def pass_rate(self) -> float:
        """The share of the rollouts of the last two groups that solved it."""
        return (self.solved + self.solved_before) / (self.attempts + self.attempts_before)


@dataclass
class Difficulty:
    """What is known, by problem id. Problems that were played longest ago come first.

    >>> known = Difficulty()
    >>> known.add("p", solved=0, attempts=4, index=7).pass_rate, known.add("p", solved=4, attempts=4, index=9).pass_rate
    (0.0, 0.5)
    >>> known.add("p", solved=4, attempts=4, index=11).pass_rate
    1.0
    """

    by_id: dict[str, Attempts] = field(default_factory=dict)

    def add(self, problem_id: str, solved: int, attempts: int, index: int) -> Attempts:
        """Count a group of at least one rollout; returns what is known now."""
        before = self.by_id.pop(problem_id, Attempts(0, 0))
        known = self.by_id[problem_id] = Attempts(solved, attempts, before.solved, before.attempts, index)
        return known

    def forget(self) -> list[Attempts]:
        """Forget the problems beyond `MAX_PROBLEMS`; returns what was known of them."""
        oldest = list(self.by_id)[: max(0, len(self.by_id) - MAX_PROBLEMS)]
        return [self.by_id.pop(problem_id) for problem_id in oldest]

    def write(self, path: Path) -> None:
        """Write the file. Raises OSError."""
        import pyarrow
        from pyarrow import parquet

        columns = {"problem_id": pyarrow.array(list(self.by_id), pyarrow.string())}
        for number, name in enumerate(Attempts._fields):
            columns[name] = pyarrow.array([known[number] for known in self.by_id.values()], pyarrow.int64())
        parquet.write_table(pyarrow.table(columns), path, compression="zstd")

    @classmethod
    def read(cls, path: Path) -> Difficulty:
        """Read the file. Raises OSError, also for a file of other content."""
        import pyarrow
        from pyarrow import parquet

        try:
            table = parquet.read_table(path, columns=["problem_id", *Attempts._fields]).to_pydict()
            rows = zip(*(table[name] for name in Attempts._fields), strict=True)
            return cls(dict(zip(table["problem_id"], (Attempts(*row) for row in rows), strict=True)))
        except (pyarrow.ArrowException, ValueError, KeyError, TypeError) as error:
            raise OSError(f"{path} holds no attempts by problem ({error})") from error
