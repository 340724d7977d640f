"""The KV cache of the embedded engine: slots for the keys and values of one policy version."""

from __future__ import annotations

import numpy as np

from vlmrl.models.attention.plan import KVPool
from vlmrl.types import IntArray

FIRST_CAPACITY_SLOTS = 4096


class KVCache:
    """Hands out slots of a `KVPool` in ascending order. It grows when it is full, and is cleared as a whole."""

    def __init__(self) -> None:
        self.pool = KVPool(0)
        self._used = 0
        self._returned = np.empty(0, np.int64)
        """Slots that `take` hands out again."""

    @property
    def used(self) -> int:
        """Slots that were handed out and did not come back."""
        return self._used - len(self._returned)

    def clear(self) -> None:
        """Reuse all slots from the first one on."""
        self._used = 0
        self._returned = np.empty(0, np.int64)

    def release(self) -> None:
        """Give the memory of all slots back."""
        self.clear()
        self.pool = KVPool(0)

    def allocate(self, slots: int) -> int:
        """Reserve `slots` consecutive slots and return the first. A full pool is copied into one of twice the size."""
        first = self._used
        self._used += slots
        if self._used > self.pool.capacity:
            self.pool = self.pool.grown(max(FIRST_CAPACITY_SLOTS, 2 * self._used), first)
        return first

    def capacity_for(self, rows: int, others: int) -> int:
        """The capacity at which `allocate(rows)` and then `take(others)` need no growth."""
        return self._used + rows + max(0, others - len(self._returned))

    def reserve(self, capacity: int) -> None:
        """Have a pool of `capacity` slots or more. A larger one gets a copy of the slots in use."""
        if capacity > self.pool.capacity:
            self.pool = self.pool.grown(capacity, self._used) if self._used else KVPool(capacity)

    def take(self, slots: int) -> IntArray:
        """Reserve `slots` slots that need not follow each other → int64 [slots]. Those that came back go first."""
        found, self._returned = self._returned[:slots], self._returned[slots:]
        missing = slots - len(found)
        return np.concatenate([found, self.allocate(missing) + np.arange(missing)])

    def give_back(self, slots: IntArray) -> None:
        """Have `take` hand out `slots` again."""
        self._returned = np.concatenate([self._returned, slots])
