"""When a batch starts although some sessions have no request: once no request has come for a short time.

    request ─ request ── request ───── quiet time over: the batch starts
                                 ◀───▶
The quiet time is a small share of the time that the last batch took, so that it costs little and grows with what a
larger batch saves. A steady trickle of requests cannot hold up a batch for longer than `LONGEST_SHARE` of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

QUIET_SHARE = 0.03
"""Quiet time as a share of the time of the last batch. Measured in benchmarks/endpoint.md."""

SHORTEST_QUIET_S = 0.002
"""A local HTTP request takes 1 to 2 ms."""

LONGEST_QUIET_S = 0.05

LONGEST_SHARE = 0.25
"""The longest wait for more requests, as a share of the time of the last batch."""


class QuietTime:
    """Calls `run` after a quiet time."""

    def __init__(self, run: Callable[[], None]) -> None:
        self._run = run
        self._timer: asyncio.TimerHandle | None = None
        self._since: float | None = None
        self._batch_s = 0.0

    def note_batch(self, seconds: float) -> None:
        """Remember how long a batch took."""
        self._batch_s = seconds

    def begin(self) -> None:
        """Begin the quiet time again, because a request has come."""
        loop = asyncio.get_running_loop()
        self._cancel()
        if self._since is None:
            self._since = loop.time()
        quiet = min(max(QUIET_SHARE * self._batch_s, SHORTEST_QUIET_S), LONGEST_QUIET_S)
        latest = self._since + max(LONGEST_SHARE * self._batch_s, quiet)
        self._timer = loop.call_at(min(loop.time() + quiet, latest), self._run)

    def stop(self) -> None:
        """Forget the requests so far: a batch starts, or has to wait for something else."""
        self._cancel()
        self._since = None

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
