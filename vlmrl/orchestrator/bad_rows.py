"""What happens at rows that cannot be used: they are recorded once each, and the run stops where they are too many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from vlmrl.config.task import BadRows
from vlmrl.errors import BadRowsError
from vlmrl.record.bad_rows import BadRowRecord, place_of
from vlmrl.record.faults import fault_kind
from vlmrl.record.step_log import Phase
from vlmrl.tasks.base import BadRow, NoProblem, Split

ENOUGH_ROWS = 20
"""Rows that are drawn before their share of bad ones is judged."""


@dataclass(eq=False)
class BadRowWatch:
    """Counts the rows of one task, by the settings `task.bad_rows` and `task.max_bad_row_rate`."""

    policy: BadRows = BadRows.skip
    max_rate: float = 1.0
    run: str = "outputs/latest"
    """The run's folder, for the command in messages."""
    record: Callable[[Sequence[BadRowRecord]], None] = lambda rows: None
    """Receives each bad row once."""
    _known: set[tuple[str, int | str]] = field(init=False, default_factory=set)
    _by_step: Counter[int] = field(init=False, default_factory=Counter)
    """Distinct bad training rows by RL step; those of supervised steps are at 0."""
    _good: int = field(init=False, default=0)
    _bad: Counter[str] = field(init=False, default_factory=Counter)
    """Bad rows that this process has drawn, by kind of reason; a row of two passes counts twice."""
    _examples: dict[str, str] = field(init=False, default_factory=dict)

    def restore(self, rows: Sequence[BadRowRecord]) -> None:
        """Take over what the run has recorded before it was resumed."""
        for row in rows:
            self._remember(row)

    def count(self, step: int) -> int:
        """Distinct bad rows of the training split that were found for RL steps until `step`, or in the warm-up."""
        return sum(rows for found, rows in self._by_step.items() if found <= step)

    def used(self, rows: int = 1) -> None:
        """Rows were drawn that can be used."""
        self._good += rows

    def absent(self, phase: Phase, split: Split, step: int, index: int, why: NoProblem) -> None:
        """An index has no problem. A row that belongs to the other split is not counted.

        Raises `BadRowsError` where the settings say that the run stops.
        """
        if not isinstance(why, BadRow):
            return
        row: BadRowRecord = {
            "step": step,
            "phase": phase,
            "split": split,
            "index": index,
            "source": why.source,
            "row": why.row,
            "reason": why.reason,
        }
        if _key(row) not in self._known:
            self._remember(row)
            self.record([row])
        if self.policy is BadRows.fail:
            raise BadRowsError(
                f"{place_of(row)} cannot be used: {why.reason}. The run stops there because of task.bad_rows=fail: "
                "repair the row, or set task.bad_rows=skip to leave such rows out"
            )
        kind = fault_kind("", why.reason)[1]
        self._bad[kind] += 1
        self._examples.setdefault(kind, f"{place_of(row)}: {why.reason}")
        bad = self._bad.total()
        if bad + self._good >= ENOUGH_ROWS and bad > self.max_rate * (bad + self._good):
            kind, count = self._bad.most_common(1)[0]
            raise BadRowsError(
                f"{bad} of {bad + self._good} rows ({bad / (bad + self._good):.0%}) cannot be used, more than "
                f"task.max_bad_row_rate={self.max_rate:g}; most often ({count} of {bad}): {self._examples[kind]}. List "
                f"them with python -m vlmrl mode=faults run={self.run}, repair them, or raise task.max_bad_row_rate"
            )

    def _remember(self, row: BadRowRecord) -> None:
        self._known.add(_key(row))
        if row["split"] == "train":
            self._by_step[0 if row["phase"] == "supervised" else row["step"]] += 1


def _key(row: BadRowRecord) -> tuple[str, int | str]:
    """Equal for two draws of the same row."""
    if row["row"] is not None:
        return row["source"], row["row"]
    return (row["source"], "") if row["source"] else (row["split"], row["index"])
