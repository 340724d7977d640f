"""ByteLRU against a model that is written without bookkeeping, its two rules for large entries, and threads."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmrl.caches.lru import ByteLRU

LIMIT = 10


class SlowLRU:
    """The same rules on a list of (key, value, bytes), least recently used first; sizes are summed anew each time."""

    def __init__(self, *, keep_newest: bool) -> None:
        self.keep_newest = keep_newest
        self.entries: list[tuple[str, int, int]] = []

    def get(self, key: str) -> int | None:
        for entry in self.entries:
            if entry[0] == key:
                self.entries.remove(entry)
                self.entries.append(entry)
                return entry[1]
        return None

    def put(self, key: str, value: int, num_bytes: int) -> None:
        self.entries = [entry for entry in self.entries if entry[0] != key]
        if num_bytes > LIMIT and not self.keep_newest:
            return
        self.entries.append((key, value, num_bytes))
        while len(self.entries) > 1 and sum(entry[2] for entry in self.entries) > LIMIT:
            del self.entries[0]

    def pop(self, key: str) -> int | None:
        value = self.get(key)
        self.entries = [entry for entry in self.entries if entry[0] != key]
        return value


KEYS = st.sampled_from("abcdef")
OPERATIONS = st.one_of(
    st.tuples(st.just("get"), KEYS),
    st.tuples(st.just("put"), KEYS, st.integers(), st.integers(0, 14)),
    st.tuples(st.just("pop"), KEYS),
)


@given(st.lists(OPERATIONS, max_size=40), st.booleans())
def test_every_operation_does_what_the_slow_one_does(operations: list[tuple[object, ...]], keep_newest: bool) -> None:
    cache: ByteLRU[str, int] = ByteLRU(LIMIT, keep_newest=keep_newest)
    slow = SlowLRU(keep_newest=keep_newest)
    for name, *arguments in operations:
        assert getattr(cache, str(name))(*arguments) == getattr(slow, str(name))(*arguments)
        assert cache.num_bytes == sum(entry[2] for entry in slow.entries)
        assert len(cache) == len(slow.entries)
        assert all((key in cache) == any(entry[0] == key for entry in slow.entries) for key in "abcdef")


def test_an_entry_above_the_limit_is_not_stored_and_evicts_nothing() -> None:
    cache: ByteLRU[str, str] = ByteLRU(LIMIT)
    cache.put("small", "s", 4)
    cache.put("large", "l", LIMIT + 1)
    assert (cache.get("small"), cache.get("large"), cache.num_bytes) == ("s", None, 4)


def test_an_entry_that_grew_above_the_limit_is_gone() -> None:
    cache: ByteLRU[str, str] = ByteLRU(LIMIT)
    cache.put("a", "old", 4)
    cache.put("a", "new", LIMIT + 1)
    assert (cache.get("a"), cache.num_bytes) == (None, 0)


def test_with_keep_newest_an_entry_above_the_limit_stays_until_the_next() -> None:
    cache: ByteLRU[str, str] = ByteLRU(LIMIT, keep_newest=True)
    cache.put("small", "s", 4)
    cache.put("large", "l", LIMIT + 1)
    assert (cache.get("small"), cache.get("large")) == (None, "l")
    cache.put("small", "s", 4)
    assert (cache.get("small"), cache.get("large"), cache.num_bytes) == ("s", None, 4)


def test_looking_whether_a_key_is_there_is_no_use() -> None:
    cache: ByteLRU[str, str] = ByteLRU(2)
    cache.put("a", "A", 1)
    cache.put("b", "B", 1)
    assert "a" in cache
    cache.put("c", "C", 1)
    assert "a" not in cache


def test_a_value_of_none_is_remembered() -> None:
    cache: ByteLRU[str, None] = ByteLRU(LIMIT)
    made = []
    for _ in range(2):
        assert cache.get_or_make("a", lambda: made.append("a"), lambda value: 1) is None
    assert made == ["a"]
    assert cache.get("b", "nothing") == "nothing"


def test_what_make_raises_is_raised_and_nothing_is_stored() -> None:
    cache: ByteLRU[str, float] = ByteLRU(LIMIT)
    with pytest.raises(ZeroDivisionError):
        cache.get_or_make("a", lambda: 1 / 0, lambda value: 1)
    assert len(cache) == 0


def test_clear_leaves_no_bytes() -> None:
    cache: ByteLRU[str, str] = ByteLRU(LIMIT)
    cache.put("a", "A", 3)
    cache.clear()
    assert (len(cache), cache.num_bytes, cache.get("a")) == (0, 0, None)


def test_threads_leave_the_bytes_of_the_entries_that_are_there() -> None:
    cache: ByteLRU[int, int] = ByteLRU(50)
    go = threading.Barrier(4)

    def work(seed: int) -> None:
        go.wait()
        for i in range(3000):
            key = (seed * 7919 + i * 31) % 97
            cache.put(key, key, key % 7 + 1)
            cache.get((key * 3) % 97)
            cache.pop((key * 5) % 97)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    left = [key for key in range(97) if key in cache]
    assert cache.num_bytes == sum(key % 7 + 1 for key in left) <= 50
    assert len(left) == len(cache)
