"""The KV cache of the embedded engine: slots for the keys and values of one policy version."""

from __future__ import annotations

from vlmrl.models.attention.plan import KVPool

FIRST_CAPACITY_SLOTS = 4096


class KVCache:
    """Hands out slots of a `KVPool` in ascending order. It grows when it is full, and is cleared only as a whole."""

    def __init__(self) -> None:
        self.pool = KVPool(0)
        self._used = 0

    @property
    def used(self) -> int:
        """Slots that were handed out."""
        return self._used

    def clear(self) -> None:
        """Reuse all slots from the first one on."""
        self._used = 0

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
