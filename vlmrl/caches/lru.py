"""A cache that is bounded by bytes and evicts the least recently used entry.

Used for processed images, rendered prompts, image features, and encoded images on both sides of the wire. Imports
nothing beyond the standard library, because one of its users runs inside vLLM's process.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar, overload

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")
D = TypeVar("D")


class ByteLRU(Generic[K, V]):
    """Entries of `limit_bytes` in total; the caller states each entry's size. Thread-safe.

    An entry that is larger than the limit is not stored and evicts nothing. With `keep_newest` it is stored and evicts
    everything else, so that the entry added last can always be found.

    >>> cache: ByteLRU[str, str] = ByteLRU(limit_bytes=5)
    >>> for key, num_bytes in [("a", 3), ("b", 2)]:
    ...     cache.put(key, key.upper(), num_bytes)
    >>> cache.get("a")
    'A'
    >>> cache.put("c", "C", 1)  # evicts "b": "a" was used after it
    >>> [key in cache for key in "abc"], cache.num_bytes
    ([True, False, True], 4)
    """

    def __init__(self, limit_bytes: int, *, keep_newest: bool = False) -> None:
        self.limit_bytes = limit_bytes
        self._keep_newest = keep_newest
        self._entries: OrderedDict[K, tuple[V, int]] = OrderedDict()
        """Key → value and its bytes, least recently used first."""
        self._num_bytes = 0
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        """Bytes of all entries, as their callers stated them."""
        return self._num_bytes

    def __contains__(self, key: object) -> bool:
        """Whether `key` has an entry. Does not count as a use."""
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    @overload
    def get(self, key: K) -> V | None: ...

    @overload
    def get(self, key: K, default: D) -> V | D: ...

    def get(self, key: K, default: D | None = None) -> V | D | None:
        """The value of `key`, which becomes the most recently used; `default` if there is no entry."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return default
            self._entries.move_to_end(key)
            return entry[0]

    def put(self, key: K, value: V, num_bytes: int) -> None:
        """Store `value` as the most recently used entry, in place of the key's old one, and evict down to the limit."""
        with self._lock:
            self._remove(key)
            if num_bytes > self.limit_bytes and not self._keep_newest:
                return
            self._entries[key] = (value, num_bytes)
            self._num_bytes += num_bytes
            while self._num_bytes > self.limit_bytes and len(self._entries) > 1:
                self._remove(next(iter(self._entries)))

    def get_or_make(self, key: K, make: Callable[[], V], num_bytes: Callable[[V], int]) -> V:
        """The value of `key`, made and stored if there is none. Two threads may make the same value at the same time:
        `make` runs without the lock."""
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
                return self._entries[key][0]
        value = make()
        self.put(key, value, num_bytes(value))
        return value

    def pop(self, key: K) -> V | None:
        """Remove the entry of `key` and return its value; None if there is none."""
        with self._lock:
            return self._remove(key)

    def clear(self) -> None:
        """Remove every entry."""
        with self._lock:
            self._entries.clear()
            self._num_bytes = 0

    def _remove(self, key: K) -> V | None:
        """`pop` for a caller that holds the lock."""
        entry = self._entries.pop(key, None)
        if entry is None:
            return None
        self._num_bytes -= entry[1]
        return entry[0]
