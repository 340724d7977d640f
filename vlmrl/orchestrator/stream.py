"""Draw problems: one after another, in one order, whatever the timing.

    Indices ─▶ task.problem ─▶ usable? ─▶ Drawn ─▶ a group
       ▲           │ NoProblem     │ its prompt is too long, its image is broken
       │           └───────────────┴─▶ passed over; a bad row is recorded, and the next index is tried
       └── cursor: the next index, and those handed out to steps that the weights do not contain yet

A step draws in rounds of the number that is still missing, so no problem is drawn that is not played. Steps that roll
out at the same time (`orchestrator.max_staleness`) draw in the order in which they asked. So which problem comes after
which depends on the task, the seed and the indices alone.

Every sequence of a run is one of these: the groups of RL steps with their refill, the supervised steps (from index
2**40 on, supervised.py), the demonstrations in RL steps, and the problems of an evaluation. A task without rows that
never raises `NoProblem` is drawn as if there were none of this.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Protocol

from vlmrl.errors import BadRowsError, UserFault
from vlmrl.orchestrator.bad_rows import BadRowWatch
from vlmrl.orchestrator.opening import Opening
from vlmrl.orchestrator.task_threads import TaskThreads
from vlmrl.record.faults import fault_kind
from vlmrl.record.step_log import Phase
from vlmrl.tasks.base import BadRow, NoProblem, NotInSplit, Problem, Split, Task
from vlmrl.tasks.border import get_num_rows, get_problem
from vlmrl.trainer.loop_state import Cursor
from vlmrl.types import Group

ENDLESS_PASS = 1 << 20
"""Indices in a row without a problem after which a task without `num_rows` is given up, too."""

SHOWN_FROM = 64
"""Indices in a row without a problem from which the screen says that problems are being looked for."""


@dataclass(frozen=True, eq=False)
class Drawn:
    """A problem that was drawn, or the fault of the task's code in its place."""

    index: int
    """As given to `Task.problem`."""
    problem_id: str
    """`<split>[<index>]` for a fault."""
    problem: Problem | None
    fault: UserFault | None = None
    """Not None: the group is not played, and each of its rollouts records this fault."""
    openings: tuple[Opening, ...] = ()
    """One per sibling where the group was opened ahead."""


class Indices:
    """Hands out the indices of a sequence in ascending order, and knows which steps they went to.

    >>> indices = Indices()
    >>> indices.take(1, 3), indices.take(2, 2), indices.take(1, 1)
    ([0, 1, 2], [3, 4], [5])

    Weights that contain step 1 have not learned from indices 3 and 4, so a run that is resumed plays them first:

    >>> indices.cursor(made=1)
    Cursor(index=6, unlearned=((3, 5),))
    >>> Indices(indices.cursor(made=1)).take(2, 3)
    [3, 4, 6]
    """

    def __init__(self, cursor: Cursor | None = None) -> None:
        cursor = cursor or Cursor(0)
        self._again = deque(chain.from_iterable(range(first, end) for first, end in cursor.unlearned))
        self._next = cursor.index
        self._given: dict[int, list[int]] = {}
        self._lock = threading.Lock()  # demonstrations are made in a thread, and a run may be saved meanwhile

    @property
    def next(self) -> int:
        """The first index that was never handed out."""
        return self._next

    def take(self, step: int, count: int) -> list[int]:
        """The next indices, for `step`."""
        with self._lock:
            taken = [self._again.popleft() for _ in range(min(count, len(self._again)))]
            fresh = count - len(taken)
            taken += range(self._next, self._next + fresh)
            self._next += fresh
            self._given.setdefault(step, []).extend(taken)
            return taken

    def each(self, step: int) -> Iterator[int]:
        """The next indices for `step`, one by one."""
        while True:
            yield from self.take(step, 1)

    def cursor(self, made: int) -> Cursor:
        """The place after step `made`: everything handed out to later steps is to be handed out again."""
        with self._lock:
            for step in [step for step in self._given if step <= made]:
                del self._given[step]
            ranges = _ranges(sorted(chain(self._again, *self._given.values())))
        end = self._next
        if ranges and ranges[-1][1] == end:  # nothing after them was learned from: the sequence goes on there
            end = ranges.pop()[0]
        return Cursor(end, tuple(ranges))


def _ranges(indices: Sequence[int]) -> list[tuple[int, int]]:
    """
    >>> _ranges([2, 3, 4, 9])
    [(2, 5), (9, 10)]
    """
    found: list[tuple[int, int]] = []
    for index in indices:
        if found and found[-1][1] == index:
            found[-1] = found[-1][0], index + 1
        else:
            found.append((index, index + 1))
    return found


class PassWatch:
    """Ends a run whose task has no problem in a whole pass over a split."""

    def __init__(self, split: Split, num_rows: int | None, status: Callable[[str], None] = lambda text: None) -> None:
        """`status` shows on the screen what the run is doing."""
        self._split = split
        self._num_rows = num_rows
        self._status = status
        self._without = 0
        self._of_other_split = 0
        self._reasons: Counter[str] = Counter()
        self._examples: dict[str, str] = {}

    def found(self) -> None:
        """An index has a problem."""
        if self._without:
            self._without = self._of_other_split = 0
            self._reasons.clear()
            self._examples.clear()

    def passed_over(self, absent: NoProblem) -> None:
        """An index has no problem. Raises `BadRowsError` where that holds for a whole pass."""
        self._without += 1
        text = str(absent) or "the row belongs to the other split"
        kind = fault_kind("", absent.reason if isinstance(absent, BadRow) else text)[1]
        self._reasons[kind] += 1
        self._examples.setdefault(kind, text)
        self._of_other_split += isinstance(absent, NotInSplit)
        if self._without >= (self._num_rows or ENDLESS_PASS):
            if self._of_other_split == self._without:
                raise BadRowsError(
                    f"all {self._without:,} rows belong to the other split, so the {self._split} split has no problem "
                    "to play: hold out another share of them (task.eval_fraction), name rows to evaluate on "
                    "(task.eval_path, task.eval_split), or set orchestrator.eval.every=0 for no evaluation"
                )
            rows = f"none of the {self._num_rows:,} rows" if self._num_rows else f"none of {self._without:,} indices"
            raise BadRowsError(
                f"{rows} of the {self._split} split has a problem that can be used, so there is nothing to play; "
                f"{self._most_frequent()}. Repair the data, or the settings that it names; bad_rows.jsonl in the "
                "run's folder lists the rows"
            )
        if self._without >= SHOWN_FROM:
            self._status(f"{self._without:,} rows in a row without a {self._split} problem; {self._most_frequent()}")

    def _most_frequent(self) -> str:
        kind, count = self._reasons.most_common(1)[0]
        return f"most often ({count:,} of {self._without:,}): {self._examples[kind]}"


class Chooser(Protocol):
    """Decides which problems a step plays (`vlmrl.orchestrator.curriculum`)."""

    def begin(self, step: int) -> None:
        """A step begins to draw. Called once per step, in the order of steps."""
        ...

    def learn(self, step: int, groups: Sequence[Group]) -> None:
        """The weights now contain a step. Called in the order of steps."""
        ...

    def metrics(self, step: int) -> dict[str, float]:
        """What to report of a step."""
        ...

    def wants(self, step: int, index: int, problem_id: str) -> bool:
        """Whether `step` plays this problem. Called in the order of the indices."""
        ...


@dataclass(eq=False)
class ProblemStream:
    """The problems of one sequence."""

    task: Task
    split: Split
    indices: Indices = field(default_factory=Indices)
    once: bool = False
    """End after one pass over the split."""
    check: Callable[[Problem], Awaitable[None]] | None = None
    """Raises `BadRow` where a problem cannot be played (`fit.PromptCheck`)."""
    phase: Phase = "rl"
    """What its steps count."""
    bad_rows: BadRowWatch = field(default_factory=BadRowWatch)
    """Counts and records rows that cannot be used."""
    chooser: Chooser | None = None
    """None: every problem is played."""
    status: Callable[[str], None] = lambda text: None
    """Shows on the screen what the run is doing."""
    threads: TaskThreads = field(default_factory=TaskThreads)
    num_rows: int | None = field(init=False)
    """Indices of one pass; None where they are endless."""
    _turns: asyncio.Lock = field(init=False, default_factory=asyncio.Lock)
    _begun: int = field(init=False, default=-1)

    def __post_init__(self) -> None:
        self.num_rows = get_num_rows(self.task, self.split)
        self._watch = PassWatch(self.split, self.num_rows, self.status)

    async def draw(self, step: int, count: int) -> list[Drawn]:
        """The next `count` problems, for `step`; fewer only at the end of a stream that ends.

        Raises `BadRowsError` where a whole pass over the split has none, and where the policy of bad rows says so.
        """
        async with self._turns:  # asyncio's locks are fair
            if self.chooser is not None and step > self._begun:
                self._begun = step
                self.chooser.begin(step)
            found: list[Drawn] = []
            refused = 0
            while len(found) < count and (indices := self._next(step, count - len(found))):
                for drawn in await self._fetch(indices):
                    if isinstance(drawn, Drawn):
                        self._watch.found()
                        if refused < (self.num_rows or ENDLESS_PASS) and not self._is_wanted(step, drawn):
                            refused += 1
                            continue
                        self.bad_rows.used()
                        found.append(drawn)
                    else:
                        index, why = drawn
                        self.bad_rows.absent(self.phase, self.split, step, index, why)
                        self._watch.passed_over(why)
            return found

    def learn(self, step: int, groups: Sequence[Group]) -> None:
        """The weights now contain `step`, which played these groups."""
        if self.chooser is not None:
            self.chooser.learn(step, groups)

    def passes(self, step: int) -> float | None:
        """Passes over the split that the weights after `step` have learned from; None where problems are endless."""
        return None if self.num_rows is None else self.indices.cursor(step).learned / self.num_rows

    def metrics(self, step: int) -> dict[str, float]:
        """`data/…` of a task with rows, and what the chooser reports. The weights contain `step`."""
        metrics = {} if self.chooser is None else self.chooser.metrics(step)
        if self.num_rows is None and not self.bad_rows.count(step):
            return metrics
        rows = self.indices.cursor(step).learned
        epoch = {} if self.num_rows is None else {"data/epoch": rows / self.num_rows}
        return metrics | epoch | {"data/rows_seen": float(rows), "data/bad_rows": float(self.bad_rows.count(step))}

    async def again(self, indices: Sequence[int]) -> list[Drawn]:
        """Problems that were drawn before, made again."""
        return [drawn for drawn in await self._fetch(indices, check=False) if isinstance(drawn, Drawn)]

    def _next(self, step: int, count: int) -> list[int]:
        if self.once and self.num_rows is not None:
            count = min(count, self.num_rows - self.indices.next)
        return self.indices.take(step, count)

    def _is_wanted(self, step: int, drawn: Drawn) -> bool:
        return (
            self.chooser is None or drawn.fault is not None or self.chooser.wants(step, drawn.index, drawn.problem_id)
        )

    async def _fetch(self, indices: Iterable[int], check: bool = True) -> list[Drawn | tuple[int, NoProblem]]:
        return await asyncio.gather(*(self._fetch_one(index, check) for index in indices))

    async def _fetch_one(self, index: int, check: bool) -> Drawn | tuple[int, NoProblem]:
        try:
            problem, problem_id = await self.threads.run(partial(get_problem, self.task, self.split, index))
            if check and self.check is not None:
                await self.check(problem)
        except NoProblem as absent:
            return index, absent
        except UserFault as fault:
            return Drawn(index, f"{self.split}[{index}]", None, fault)
        return Drawn(index, problem_id, problem)


class FixedProblems:
    """The first problems of a split, the same each time: those of an evaluation.

    Which indices have a problem is found once. So a split of which one row in a hundred is held out is searched before
    the first evaluation only.
    """

    def __init__(self, stream: ProblemStream) -> None:
        """`stream` is a new one, with `once`."""
        self._stream = stream
        self._indices: list[int] = []
        self._is_complete = False

    async def first(self, count: int, step: int = 0) -> list[Drawn]:
        """The first `count` problems; all of one pass where there are fewer. `step` is that of the record."""
        known = self._indices[:count]
        found = await self._stream.again(known)
        missing = count - len(known)
        if missing and not self._is_complete:
            new = await self._stream.draw(step, missing)
            self._indices += [drawn.index for drawn in new]
            self._is_complete = len(new) < missing
            found += new
        return found
