"""What waited for what: rollouts and training run at the same time where `max_staleness` allows it.

    time/step            = time/rollout + time/train + time/sync, one after the other, of the trainer
    time/rollout         the trainer waited for this step's rollouts; all they took, when on-policy
    time/rollout_span    from the first of this step's rollouts to the last, whatever else went on
    time/engine_idle     no training rollout was under way: the engine waited for the trainer

A step that is bound by its rollouts has time/engine_idle near 0, one that is bound by training time/rollout.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Overlap:
    """Keeps the time of the rollouts of several steps that are under way at once."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._spans: dict[int, float] = {}
        self._under_way = 0
        self._idle_since = clock()
        self._idle = 0.0

    @contextmanager
    def rolling_out(self, step: int) -> Iterator[None]:
        """Around the rollouts of one step."""
        started = self._clock()
        if not self._under_way:
            self._idle += started - self._idle_since
        self._under_way += 1
        try:
            yield
        finally:
            ended = self._clock()
            self._spans[step] = ended - started
            self._under_way -= 1
            if not self._under_way:
                self._idle_since = ended

    def begin(self) -> None:
        """Forget the idle time so far: of an evaluation, of the start."""
        self._idle, self._idle_since = 0.0, self._clock()

    def metrics(self, step: int) -> dict[str, float]:
        """Of `step`, whose rollouts are over; idle time since `begin` or the last call, up to now.

        >>> now = iter([0.0, 1.0, 5.0, 7.0]).__next__
        >>> overlap = Overlap(now)
        >>> with overlap.rolling_out(1):  # from second 1 to 5
        ...     pass
        >>> overlap.metrics(1)  # at second 7
        {'time/rollout_span': 4.0, 'time/engine_idle': 3.0}
        """
        now = self._clock()
        idle = self._idle + (now - self._idle_since if not self._under_way else 0.0)
        self._idle, self._idle_since = 0.0, now
        return {"time/rollout_span": self._spans.pop(step), "time/engine_idle": idle}
