"""What the stores of images and videos share: each distinct item is processed once, and is one object.

    part ──decode──▶ pixels ──hash──▶ known? ──process──▶ item, interned by its hash

A part is a value: its pixels are read when it is first used. The stores remember parts by identity, and keep only the
hash of a part: a task may hold all images of a dataset without keeping their processed versions alive.
"""

from __future__ import annotations

import asyncio
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from functools import partial
from typing import Generic, NamedTuple, TypeVar
from weakref import WeakKeyDictionary, WeakValueDictionary

import numpy as np

from vlmrl.caches.lru import ByteLRU
from vlmrl.types import Image, ImageItem, MMItem, Video, VideoItem

T = TypeVar("T")
PartT = TypeVar("PartT", Image, Video)
ItemT = TypeVar("ItemT", ImageItem, VideoItem)

RECENT_BYTES = 256 << 20
"""Processed items that are kept alive although nothing else refers to them: the most recently used ones."""

WORKERS = 4
"""Threads that decode and process the items of one kind."""


class Processed(NamedTuple):
    """What a processor makes of one image or video: fields of its item."""

    mm_kwargs: dict[str, np.ndarray]
    num_tokens: int
    replacement: str = ""


class ItemStore(ABC, Generic[PartT, ItemT]):
    """The items of one kind. Thread-safe. An item is processed again only if it was evicted in between."""

    def __init__(self, name: str) -> None:
        """`name` is that of its threads."""
        self._lock = threading.Lock()
        self._items: WeakValueDictionary[str, ItemT] = WeakValueDictionary()
        self._hash_of_part: WeakKeyDictionary[PartT, str] = WeakKeyDictionary()
        self._pending: dict[str, Future[ItemT]] = {}
        self._recent: ByteLRU[str, ItemT] = ByteLRU(RECENT_BYTES, keep_newest=True)
        self._threads: DaemonThreads[ItemT] = DaemonThreads(WORKERS, name)

    @abstractmethod
    def _at_once(self, part: PartT) -> ItemT | None:
        """The item of a part, if finding it takes too little work for a thread; else None."""

    @abstractmethod
    def _item(self, part: PartT) -> ItemT:
        """The item of a part. Raises `ImageError`."""

    def begin(self, part: PartT) -> ItemT | Future[ItemT]:
        """The item of a part, or its future result."""
        return self._at_once(part) or self._threads.submit(partial(self._item, part))

    def known(self, digest: str) -> ItemT:
        """The item of a hash. The caller must keep the item alive."""
        return self._items[digest]

    def items(self, parts: Iterable[PartT]) -> tuple[ItemT, ...]:
        """One item per part. Waits for the threads that decode and process new items; Ctrl-C ends the wait. Raises
        `ImageError`."""
        return _finished([self.begin(part) for part in parts])

    async def items_async(self, parts: Iterable[PartT]) -> tuple[ItemT, ...]:
        """Same as `items`, without blocking the event loop."""
        return await _awaited([self.begin(part) for part in parts])

    def _intern(self, digest: str, make: Callable[[], ItemT]) -> ItemT:
        """The item of a hash, made at most once."""
        with self._lock:
            item = self._items.get(digest)
            pending = self._pending.get(digest)
            if item is None and pending is None:
                mine = self._pending[digest] = Future()
        if item is not None:
            return item
        if pending is not None:
            return pending.result()  # another thread is processing this item
        try:
            item = make()
        except BaseException as error:
            with self._lock:
                del self._pending[digest]
            mine.set_exception(error)
            raise
        with self._lock:
            self._items[digest] = item
            self._touch(item)
            del self._pending[digest]
        mine.set_result(item)
        return item

    def _find(self, digest: str | None) -> ItemT | None:
        """The item of a hash; None if there is none."""
        if digest is None:
            return None
        with self._lock:
            item = self._items.get(digest)
            if item is not None:
                self._touch(item)
            return item

    def _touch(self, item: ItemT) -> None:
        """Mark an item as the most recently used one."""
        self._recent.get_or_make(item.hash, lambda: item, _num_bytes)


class ItemStores:
    """The images and videos of one renderer."""

    def __init__(self, images: ItemStore[Image, ImageItem], videos: ItemStore[Video, VideoItem]) -> None:
        self._images = images
        self._videos = videos

    def items(self, parts: Iterable[Image | Video]) -> tuple[MMItem, ...]:
        """One item per part, as `ItemStore.items`."""
        return _finished([self._begin(part) for part in parts])

    async def items_async(self, parts: Iterable[Image | Video]) -> tuple[MMItem, ...]:
        """Same as `items`, without blocking the event loop."""
        return await _awaited([self._begin(part) for part in parts])

    def _begin(self, part: Image | Video) -> MMItem | Future[MMItem]:
        begun: MMItem | Future[MMItem] = (
            self._images.begin(part) if isinstance(part, Image) else self._videos.begin(part)  # type: ignore[assignment]
        )
        return begun


def _finished(begun: list[T | Future[T]]) -> tuple[T, ...]:
    return tuple(item.result() if isinstance(item, Future) else item for item in begun)


async def _awaited(begun: list[T | Future[T]]) -> tuple[T, ...]:
    waits = [asyncio.wrap_future(item) for item in begun if isinstance(item, Future)]
    processed = iter(await asyncio.gather(*waits))
    return tuple(next(processed) if isinstance(item, Future) else item for item in begun)


class DaemonThreads(Generic[T]):
    """At most `limit` threads, which end when there is nothing to do.

    They are daemons, which the standard library's pools do not offer: a read from a file system that does not answer
    must not keep an interrupted run from ending.
    """

    def __init__(self, limit: int, name: str) -> None:
        self._limit = limit
        self._name = name
        self._lock = threading.Lock()
        self._calls: deque[tuple[Callable[[], T], Future[T]]] = deque()
        self._running = 0

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """The future result of `call`, or its exception."""
        future: Future[T] = Future()
        with self._lock:
            self._calls.append((call, future))
            if self._running == self._limit:
                return future
            self._running += 1
        threading.Thread(target=self._work, name=self._name, daemon=True).start()
        return future

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._calls:
                    self._running -= 1
                    return
                call, future = self._calls.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = call()
            except BaseException as error:  # noqa: BLE001 — whoever waits for the result raises it
                future.set_exception(error)
            else:
                future.set_result(result)
            del call, future  # an idle thread must not keep an image alive


def _num_bytes(item: ImageItem | VideoItem) -> int:
    pixels = item.pixels if isinstance(item, ImageItem) else item.frames
    return pixels.nbytes + sum(array.nbytes for array in item.mm_kwargs.values())
