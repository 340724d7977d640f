"""When a batch starts although some sessions have no request: once no request has come for a short time.

    request ─ request ── request ───── quiet time over: the batch starts
                                 ◀───▶
The quiet time is a share of the time that the last batch took, so that it costs little and grows with what a larger
batch saves. The share is larger while many sessions are missing that were answered a short time ago, or opened: a batch
without them takes nearly as long as one with them. A steady trickle of requests cannot hold up a batch for longer than
`LONGEST_SHARE` of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

QUIET_SHARE = 0.02
"""Quiet time as a share of the time of the last batch, while nobody is missing. Measured in benchmarks/endpoint.md."""

MISSING_SHARE = 0.25
"""What is added to it while everybody is missing: about what a batch of one takes, next to a batch of all. So waiting
costs at most as much as it may save."""

SHORTEST_QUIET_S = 0.002
"""A local HTTP request takes 1 to 2 ms."""

MISSED_SHARE = 0.25
"""The time for which a session is missed, as a share of the time of the last batch."""

LONGEST_SHARE = 0.5
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

    @property
    def patience_s(self) -> float:
        """How long a session is missed after it was answered or opened, in seconds."""
        return MISSED_SHARE * self._batch_s

    def begin(self, missing: float) -> None:
        """Begin the quiet time again, because a request has come. `missing`: the share of the requests to come that are
        missing."""
        loop = asyncio.get_running_loop()
        self._cancel()
        if self._since is None:
            self._since = loop.time()
        quiet = max((QUIET_SHARE + MISSING_SHARE * missing) * self._batch_s, SHORTEST_QUIET_S)
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
