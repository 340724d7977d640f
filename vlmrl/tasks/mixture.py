"""`task=mixture`: the problems of several tasks, interleaved by their weights in a fixed order.

    index ─▶ Interleaving ─▶ (name of a task, index in that task) ─▶ that task's problem, as a MixedProblem

The order is arithmetic: which task has an index, and which of its own indices that is, follows from the weights alone,
also at 2**40, where the problems of supervised steps begin. So a resumed run goes on where it stopped, and each task
goes through its own rows in its own order, whatever the others do.

Training: the weights are brought to whole numbers that add up to a period, and each period has the same pattern, in
which every task is spread as evenly as it goes. Evaluation: one problem of each task in turn, so that tasks of which
one row in ten is held out have the same part of it as others; a task whose rows are all played leaves the round.

Left out on purpose: weights that change during a run.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from vlmrl.config.task import MixtureConfig
from vlmrl.errors import ConfigError
from vlmrl.tasks.base import BadRow, FromRow, NotInSplit, Preference, Problem, Reference, Split, Task
from vlmrl.tasks.border import get_num_rows
from vlmrl.tasks.loading import data_table_of, load_task, shows_videos, texts_of
from vlmrl.tasks.preferences import preference_of
from vlmrl.types import Message

LONGEST_PERIOD = 4096
"""Problems after which the pattern of training repeats, at most; the share of a task is exact to one part of it."""


@dataclass(frozen=True)
class MixedProblem:
    """A problem of one of the tasks."""

    task: str
    """The name of the task."""
    max_turns: int
    """Most turns of its episodes."""
    problem: Problem
    """The task's own problem."""

    @property
    def id(self) -> str:
        """The problem's own id behind the name of its task, so that no two tasks share one."""
        return f"{self.task}/{self.problem.id}"


@dataclass(frozen=True)
class MixedReference(MixedProblem):
    """A problem that reward terms can score (`vlmrl.tasks.base.Reference`)."""

    problem: Reference

    @property
    def answer(self) -> Any:
        return self.problem.answer

    @property
    def columns(self) -> Mapping[str, Any]:
        return self.problem.columns


@dataclass(frozen=True)
class MixedRow(MixedReference):
    """A row of a data set (`vlmrl.tasks.base.FromRow`)."""

    problem: Any

    @property
    def source(self) -> str:
        source: str = self.problem.source
        return source

    @property
    def row(self) -> int:
        row: int = self.problem.row
        return row


class MixtureTask(Task):
    """The tasks of a `MixtureConfig` as one task."""

    def __init__(self, config: MixtureConfig, *, seed: int) -> None:
        """Make every task. Raises ConfigError as they do."""
        self._tasks: dict[str, Task] = {}
        for name, own in config.tasks.items():
            with keys_at(f"task.tasks.{name}"):
                self._tasks[name] = load_task(own, seed=seed)
        self._max_turns = {name: own.max_turns for name, own in config.tasks.items()}
        self._names = tuple(self._tasks)
        self._rows = {
            split: [get_num_rows(task, split) for task in self._tasks.values()] for split in ("train", "eval")
        }
        self._training = Pattern([config.weights.get(name, 1.0) for name in self._names])
        self._rounds = Rounds(self._rows["eval"])
        self._held_out = {
            name: HeldOut(task, rows)
            for (name, task), rows in zip(self._tasks.items(), self._rows["eval"], strict=True)
        }

    @property
    def tasks(self) -> Mapping[str, Task]:
        """The tasks by name."""
        return self._tasks

    def place(self, split: Split, index: int) -> tuple[str, int]:
        """The name of the task that has an index, and the index in that task; in the evaluation split, which of its
        held-out problems."""
        number, own = self._training.place(index) if split == "train" else self._rounds.place(index)
        return self._names[number], own

    def problem(self, split: Split, index: int) -> MixedProblem:
        """The problem of the task that has this index. Raises `NoProblem` where that task does."""
        name, own = self.place(split, index)
        with keys_at(f"task.tasks.{name}"):
            problem = self._tasks[name].problem(split, own) if split == "train" else self._held_out[name].problem(own)
        kind: type[MixedProblem] = MixedProblem
        if isinstance(problem, Reference):
            kind = MixedRow if isinstance(problem, FromRow) else MixedReference
        return kind(name, self._max_turns[name], problem)

    def num_rows(self, split: Split) -> int | None:
        """Training: the indices after which every task has been passed over at least once. Evaluation: those of all
        tasks together. None where a task is endless."""
        rows = self._rows[split]
        finite = [each for each in rows if each is not None]
        if len(finite) < len(rows):
            return None
        return sum(finite) if split == "eval" else self._training.length_with(finite)

    def env(self, problem: MixedProblem) -> Any:
        return self._tasks[problem.task].env(problem.problem)

    def demonstration(self, problem: MixedProblem, *, random_answers: bool, seed: int) -> tuple[Message, ...]:
        with keys_at(f"task.tasks.{problem.task}"):
            return self._tasks[problem.task].demonstration(problem.problem, random_answers=random_answers, seed=seed)

    def preference(self, problem: MixedProblem) -> Preference:
        with keys_at(f"task.tasks.{problem.task}"):
            return preference_of(self._tasks[problem.task], problem.problem)

    def texts(self) -> tuple[str, ...]:
        """The texts of all tasks, so that a tokenizer that is made here knows the words of each."""
        return tuple(text for task in self._tasks.values() for text in texts_of(task))

    def data_table(self) -> dict[str, str]:
        """What each task has read, behind its name."""
        return {
            f"{name} {fact}": text for name, task in self._tasks.items() for fact, text in data_table_of(task).items()
        }

    def shows_videos(self) -> bool:
        """Whether rows of any task show videos."""
        return any(shows_videos(task) for task in self._tasks.values())


class HeldOut:
    """The held-out problems of one task, counted: rows of the training split between them do not count.

    They are looked for from the first row on and remembered, so the same number is always the same problem.
    """

    def __init__(self, task: Task, num_rows: int | None) -> None:
        self._task = task
        self._num_rows = num_rows
        self._indices: list[int] = []
        self._next = 0
        self._lock = threading.Lock()

    def problem(self, number: int) -> Problem:
        """The held-out problem with this number. Raises `NoProblem` where there are fewer, or where the row is bad."""
        with self._lock:
            while len(self._indices) <= number:
                if self._num_rows is not None and self._next >= self._num_rows:
                    raise NotInSplit(f"the task has no more than {len(self._indices):,} held-out problems")
                index, self._next = self._next, self._next + 1
                try:
                    problem = self._task.problem("eval", index)
                except NotInSplit:
                    continue
                except Exception:  # a bad row counts: it is recorded, and the next number is tried
                    self._indices.append(index)
                    if len(self._indices) > number:
                        raise
                    continue
                self._indices.append(index)
                if len(self._indices) > number:
                    return problem
            index = self._indices[number]
        return self._task.problem("eval", index)


@contextmanager
def keys_at(key: str) -> Iterator[None]:
    """Let what the task at `key` says of its keys (`task.…`) name them as they stand in the config.

    >>> with keys_at("task.tasks.a"):
    ...     raise ConfigError("task.path=x is no file: set task.path")
    Traceback (most recent call last):
    vlmrl.errors.ConfigError: task.tasks.a.path=x is no file: set task.tasks.a.path
    """

    def renamed(text: str) -> str:
        return re.sub(r"(?<![\w./])task\.(?!tasks\.)(?=[a-z_])", f"{key}.", text)

    try:
        yield
    except ConfigError as error:
        raise ConfigError(renamed(str(error))) from error
    except BadRow as bad:
        raise BadRow(renamed(bad.reason), source=bad.source, row=bad.row) from bad


class Pattern:
    """Endless interleaving by weights.

    >>> pattern = Pattern([2, 1])
    >>> [pattern.place(index) for index in range(6)]
    [(0, 0), (1, 0), (0, 1), (0, 2), (1, 1), (0, 3)]
    >>> pattern.place(3 * 2**40), pattern.length_with([10, 10])
    ((0, 2199023255552), 29)
    """

    def __init__(self, weights: Sequence[float]) -> None:
        """Weights are positive."""
        self._counts = whole_numbers(weights)
        self._places: list[tuple[int, int]] = []
        taken = [0] * len(weights)
        credit = [0] * len(weights)
        period = sum(self._counts)
        for _ in range(period):  # the task that is furthest behind its share comes next
            credit = [sum(pair) for pair in zip(credit, self._counts, strict=True)]
            number = credit.index(max(credit))
            credit[number] -= period
            self._places.append((number, taken[number]))
            taken[number] += 1

    def place(self, index: int) -> tuple[int, int]:
        """The number of the task that has an index, and the index in that task."""
        periods, rest = divmod(index, len(self._places))
        number, own = self._places[rest]
        return number, periods * self._counts[number] + own

    def length_with(self, rows: Sequence[int]) -> int:
        """The first so many indices hold at least so many of each task."""
        return max(self._index_of(number, count - 1) + 1 for number, count in enumerate(rows))

    def _index_of(self, number: int, own: int) -> int:
        periods, rest = divmod(own, self._counts[number])
        return periods * len(self._places) + self._places.index((number, rest))


def whole_numbers(weights: Sequence[float]) -> list[int]:
    """Whole numbers in the proportion of the weights, each at least 1, that add up to at most `LONGEST_PERIOD`; exact
    where such numbers exist.

    >>> whole_numbers([0.7, 0.3]), whole_numbers([1, 1, 2]), whole_numbers([1e-9, 1])
    ([7, 3], [1, 1, 2], [1, 4095])
    """
    parts = [Fraction(str(weight)) for weight in weights]
    total = sum(parts)
    shares = [part / total for part in parts]
    period = next(
        (count for count in range(1, LONGEST_PERIOD + 1) if all((share * count).denominator == 1 for share in shares)),
        None,
    )
    if period is not None:
        return [int(share * period) for share in shares]
    numbers = [max(1, int(share * LONGEST_PERIOD)) for share in shares]
    numbers[numbers.index(max(numbers))] += LONGEST_PERIOD - sum(numbers)
    return numbers


class Rounds:
    """One problem of each task in turn, until its rows are played; None stands for a task without an end.

    >>> rounds = Rounds([2, 4, 1])
    >>> [rounds.place(index) for index in range(7)]
    [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (1, 2), (1, 3)]

    After one pass it starts again:

    >>> rounds.place(7), Rounds([1, None]).place(2**40)
    ((0, 0), (1, 1099511627775))
    """

    def __init__(self, rows: Sequence[int | None]) -> None:
        lengths = sorted({count for count in rows if count})
        self._phases: list[tuple[int, int, list[int]]] = []  # first index, first own index, tasks that are left
        first, played = 0, 0
        for length in [*lengths, None]:
            left = [number for number, count in enumerate(rows) if count is None or count > played]
            if not left:
                break
            self._phases.append((first, played, left))
            if length is not None:
                first += (length - played) * len(left)
                played = length
        self._length = None if None in rows else first

    def place(self, index: int) -> tuple[int, int]:
        """The number of the task that has an index, and the index in that task."""
        if self._length:
            index %= self._length
        first, played, left = next(phase for phase in reversed(self._phases) if phase[0] <= index)
        rounds, turn = divmod(index - first, len(left))
        return left[turn], played + rounds
