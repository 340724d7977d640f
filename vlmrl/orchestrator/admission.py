"""Admit groups to the engine one by one, in the order of the stream, in runs with `orchestrator.max_staleness` above 0.

    stream   7  8  9 │ 10  11  12        places for `limit` rollouts: 7, 8 and 9 play, 10 waits
             ends ─▶ 8                   10 begins once enough rollouts have ended to give a place to each of its own

Batches that began together would end together. Then one step of the trainer waits for two batches and the next for
none, and the engine is empty between them (measured: steps of 5.4 s and 13.4 s in turn).

Left out on purpose: giving a step the groups that end first, whichever they are. Short answers end first, so each step
would learn from answers that are shorter than those of the policy.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from dataclasses import dataclass, field


class Admission:
    """Places for rollouts that play at the same time."""

    def __init__(self, limit: int) -> None:
        """`limit`: the most rollouts that play at the same time."""
        self._free = limit
        self._waiting: list[tuple[int, int, int, Place]] = []
        """A heap: step, group, order of arrival, the place that waits."""
        self._arrivals = itertools.count()

    def place(self, step: int, group: int, rollouts: int) -> Place:
        """A place for all rollouts of a group, at most as many as the limit."""
        return Place(self, step, group, rollouts)

    def wait(self, place: Place) -> None:
        """Queue a place. Groups of earlier steps come first, also those that a step plays in addition."""
        heapq.heappush(self._waiting, (place.step, place.group, next(self._arrivals), place))
        self.give(0)

    def give(self, rollouts: int) -> None:
        """Free the places of rollouts that have ended, and admit the groups that fit."""
        self._free += rollouts
        while self._waiting and (place := self._waiting[0][-1]).rollouts <= self._free:
            heapq.heappop(self._waiting)
            if not place.admitted.cancelled():
                self._free -= place.rollouts
                place.admitted.set_result(None)


@dataclass(eq=False)
class Place:
    """The place of one group."""

    admission: Admission
    step: int
    group: int
    rollouts: int
    admitted: asyncio.Future[None] = field(
        init=False, default_factory=lambda: asyncio.get_running_loop().create_future()
    )

    async def enter(self) -> None:
        """Wait until the rollouts of the group may play."""
        self.admission.wait(self)
        try:
            await self.admitted
        except asyncio.CancelledError:
            if not self.admitted.cancelled():
                self.admission.give(self.rollouts)
            raise

    def leave(self, rollout: asyncio.Task[None]) -> None:
        """One rollout has ended, in whatever way."""
        self.admission.give(1)
