"""What was sent to a server ahead of its request."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

PREFETCH_LIMIT_BYTES = 512 * 1024**2
"""Most data of images that waits in a server for its first request. The server keeps at most twice as much."""


class Prefetched:
    """Bounds the images and videos that were sent ahead and that no request has used yet.

    >>> ahead = Prefetched(limit_bytes=10)
    >>> ahead.take({"a": 4, "b": 6}), ahead.take({"c": 1})
    (True, False)
    >>> ahead.use(["x", "a"])
    >>> ahead.take({"c": 4}), ahead.take({"d": 1})
    (True, False)
    """

    def __init__(self, limit_bytes: int = PREFETCH_LIMIT_BYTES) -> None:
        self._limit = limit_bytes
        self._sizes: dict[str, int] = {}
        """Hash → bytes, in the order in which they were sent."""

    def take(self, sizes: Mapping[str, int]) -> bool:
        """Whether there is room for all of these; then they count from now on. `sizes`: hash → bytes."""
        taken = dict(sizes) | self._sizes
        if sum(taken.values()) > self._limit:
            return False
        self._sizes |= sizes
        return True

    def use(self, hashes: Iterable[str]) -> None:
        """A request uses these. Groups play in the order in which they are opened, so what was sent before them and is
        still waiting was used on other servers, and counts no more."""
        used = self._sizes.keys() & set(hashes)
        while used:
            first = next(iter(self._sizes))
            used.discard(first)
            del self._sizes[first]
