"""Which steps of mode=bench warm up, and which one is the last.

    step 1 … least   warm up: they compile and fill caches
    after them       an asynchronous run warms up until rollouts or trainer wait for the other
    then             as many steps as are measured

While the first step of an asynchronous run compiles, all batches that may roll out ahead do. The next steps learn from
those and wait for nothing, so they are faster than the run ever is again.
"""

from __future__ import annotations

from dataclasses import dataclass

WAITS = 0.02
"""A side waits if it does for this share of a step."""
MOST_DRAINING = 4
"""Steps per batch that may roll out ahead, after which measuring begins anyway: then both sides are equally fast."""


@dataclass(eq=False)
class Schedule:
    """The steps of a bench, as far as they are known."""

    warmup: int
    """Steps that warm up. Grows while more of them do."""
    measured: int
    max_staleness: int
    """Batches that may roll out ahead."""

    def __post_init__(self) -> None:
        self._is_known = self.max_staleness == 0
        self.longest = self.last + MOST_DRAINING * self.max_staleness
        """The most steps that the bench may take."""

    @property
    def last(self) -> int:
        """The last step."""
        return self.warmup + self.measured

    def took(self, step: int, waited: float) -> None:
        """Count a step, from the second on, in which one side waited for the other for this share of its time.

        >>> schedule = Schedule(2, 4, max_staleness=1)
        >>> for step, waited in enumerate([0.0, 0.0, 0.3, 0.0], 2):
        ...     schedule.took(step, waited)
        >>> schedule.warmup, schedule.last, schedule.longest
        (4, 8, 10)
        """
        if self._is_known or step < self.warmup:
            return
        if waited >= WAITS or self.last >= self.longest:
            self._is_known = True
        else:
            self.warmup = step + 1
