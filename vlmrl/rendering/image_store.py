"""The images of one renderer: each distinct image is decoded and processed once, and becomes one `ImageItem`.

    Image part ──decode──▶ pixels [H, W, 3] ──hash──▶ known? ──process──▶ ImageItem, interned by its hash

An `Image` part is a value: its pixels are read when it is first used. A `PIL.Image` that is changed afterwards and
passed in a new part is a different image. So the store remembers parts by identity, but not their sources: siblings
that share a PIL image wait for each other while Pillow loads it, and each reads the pixels as they are then. The store
keeps only the hash of a part: a task may hold all images of a dataset without keeping their processed versions alive.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar
from weakref import WeakKeyDictionary, WeakValueDictionary

import numpy as np
from PIL import Image as PILImage

from vlmrl.caches.lru import ByteLRU
from vlmrl.rendering.first_image import blanked, check_finite, has_tiles, probe_picture, refuse_blank_tiles
from vlmrl.rendering.images import Pixels, decode, image_errors, image_hash, lock_of, read_file
from vlmrl.types import Image, ImageItem

T = TypeVar("T")

INLINE_PIXELS = 1 << 14
"""Up to this size (128 × 128), hashing a decoded image takes less time than handing it to a thread."""

RECENT_BYTES = 256 << 20
"""Processed images that are kept alive although nothing else refers to them: the most recently used ones."""

ENCODED_HASH_BYTES = 65536 * (32 + 32)
"""Memory for the hashes of encoded images (files, bytes): room for 65,536 pairs of SHA-256 digest and image hash."""

WORKERS = 4
"""Threads that decode and process images."""


class Processed(NamedTuple):
    """What a processor makes of one image: fields of `ImageItem`."""

    mm_kwargs: dict[str, np.ndarray]
    num_tokens: int
    replacement: str = ""


class ImageStore:
    """The images of one renderer. Thread-safe.

    `process` runs the processor. It runs once per distinct image, and again only if the image was evicted in between.
    """

    def __init__(
        self,
        process: Callable[[Pixels], Processed],
        processed_size: Callable[[Mapping[str, np.ndarray]], tuple[int, int] | None] = lambda mm_kwargs: None,
    ) -> None:
        """`processed_size` returns (width, height) of what `process` made of an image, where it can be told."""
        self._process = process
        self._processed_size = processed_size
        self._refuses_blank_tiles = False
        self._lock = threading.Lock()
        self._items: WeakValueDictionary[str, ImageItem] = WeakValueDictionary()
        self._hash_of_part: WeakKeyDictionary[Image, str] = WeakKeyDictionary()
        self._pending: dict[str, Future[ImageItem]] = {}
        self._recent: ByteLRU[str, ImageItem] = ByteLRU(RECENT_BYTES, keep_newest=True)
        self._hash_of_encoded: ByteLRU[bytes, str] = ByteLRU(ENCODED_HASH_BYTES)
        self._threads: DaemonThreads[ImageItem] = DaemonThreads(WORKERS, "images")

    def try_image(self, encodes: Callable[[Sequence[ImageItem]], bool]) -> None:
        """Process one image, and refuse images with blank tiles from now on, if `encodes` (whether the model makes a
        feature of every image token of these images) says that the model drops them. Call it before the first image is
        processed. Raises `UserFault` where the processor makes no numbers of an image."""
        shown = self._made("", probe_picture())
        check_finite(shown.mm_kwargs)
        if not has_tiles(shown.mm_kwargs):
            return
        blank = ImageItem("", shown.pixels, blanked(shown.mm_kwargs), shown.num_tokens)
        self._refuses_blank_tiles = encodes([shown, shown]) and not encodes([blank, shown])

    def known(self, digest: str) -> ImageItem:
        """The item of a hash. The caller must keep the item alive."""
        return self._items[digest]

    def items(self, parts: Iterable[Image]) -> tuple[ImageItem, ...]:
        """One item per part. Waits for the threads that decode and process new images; Ctrl-C ends the wait. Raises
        `ImageError`."""
        pending = [self._at_once(part) or self._submit(part) for part in parts]
        return tuple(item.result() if isinstance(item, Future) else item for item in pending)

    async def items_async(self, parts: Iterable[Image]) -> tuple[ImageItem, ...]:
        """Same as `items`, without blocking the event loop."""
        pending = [self._at_once(part) or self._submit(part) for part in parts]
        waits = [asyncio.wrap_future(item) for item in pending if isinstance(item, Future)]
        processed = iter(await asyncio.gather(*waits))
        return tuple(next(processed) if isinstance(item, Future) else item for item in pending)

    def _submit(self, part: Image) -> Future[ImageItem]:
        return self._threads.submit(partial(self._item, part))

    def _at_once(self, part: Image) -> ImageItem | None:
        """The item of a part, if finding it takes too little work for a thread; else None."""
        with image_errors(None):
            digest = self._hash_of_part.get(part)
            if digest is None and _is_decoded_and_small(part.source):
                digest = self._hash_of_part[part] = image_hash(decode(part.source))
        return self._find(digest)

    def _item(self, part: Image) -> ImageItem:
        with image_errors(None):  # a subclass of Image may have code of its own
            source, digest = part.source, self._hash_of_part.get(part)
        item = self._find(digest)
        if item is None:
            with image_errors(source):
                item = self._item_of_source(source)
            self._hash_of_part[part] = item.hash
        return item

    def _item_of_source(self, source: Any) -> ImageItem:
        if not isinstance(source, bytes | str | Path):
            return self._intern(decode(source))
        # Sibling rollouts open the same file. Reading and hashing it takes far less time than decoding it.
        encoded = source if isinstance(source, bytes) else read_file(source)
        key = hashlib.sha256(encoded).digest()
        with lock_of(key):
            item = self._find(self._hash_of_encoded.get(key))
            if item is None:
                item = self._intern(decode(encoded))
                self._hash_of_encoded.put(key, item.hash, len(key) + len(item.hash))
        return item

    def _intern(self, pixels: Pixels) -> ImageItem:
        digest = image_hash(pixels)
        with self._lock:
            item = self._items.get(digest)
            pending = self._pending.get(digest)
            if item is None and pending is None:
                mine = self._pending[digest] = Future()
        if item is not None:
            return item
        if pending is not None:
            return pending.result()  # another thread is processing this image
        try:
            item = self._made(digest, pixels)
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

    def _made(self, digest: str, pixels: Pixels) -> ImageItem:
        """The item of an image, by the processor. Its arrays cannot be written to."""
        mm_kwargs, num_tokens, replacement = self._process(pixels)
        if self._refuses_blank_tiles:
            refuse_blank_tiles(pixels, mm_kwargs)
        processed_size = self._processed_size(mm_kwargs)
        for array in (pixels, *mm_kwargs.values()):
            array.setflags(write=False)
        return ImageItem(digest, pixels, mm_kwargs, num_tokens, processed_size, replacement)

    def _find(self, digest: str | None) -> ImageItem | None:
        """The item of a hash; None if there is none."""
        if digest is None:
            return None
        with self._lock:
            item = self._items.get(digest)
            if item is not None:
                self._touch(item)
            return item

    def _touch(self, item: ImageItem) -> None:
        """Mark an item as the most recently used one."""
        self._recent.get_or_make(item.hash, lambda: item, _num_bytes)


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


def _num_bytes(item: ImageItem) -> int:
    return item.pixels.nbytes + sum(array.nbytes for array in item.mm_kwargs.values())


def _is_decoded_and_small(source: Any) -> bool:
    """Not for subclasses: they may run the user's code, or read a file."""
    if type(source) is np.ndarray:
        return source.size <= 3 * INLINE_PIXELS
    if type(source) is PILImage.Image:
        return source.width * source.height <= INLINE_PIXELS
    return False
