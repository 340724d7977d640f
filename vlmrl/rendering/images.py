"""Images by content: each distinct image is decoded, hashed and processed once, and becomes one `ImageItem`.

    Image part ──decode──▶ pixels [H, W, 3] ──hash──▶ known? ──process──▶ ImageItem, interned by its hash

Decoding follows the model's own tool chain: Pillow's `convert("RGB")`, which drops an alpha channel. Encoded images are
rotated by their EXIF tag, as image viewers do. Samples of 16 bits are scaled to 8 bits; Pillow would clip almost all of
them to white.

An `Image` part is a value: its pixels are read when it is first used. A `PIL.Image` that is changed afterwards and
passed in a new part is a different image. So the store remembers parts by identity, but not their sources. It keeps
only the hash of a part: a task may hold all images of a dataset without keeping their processed versions alive.

Left out on purpose: URLs (a run must not depend on a web server) and animations (the first frame is used).
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import struct
import threading
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary, WeakValueDictionary

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage
from PIL import ImageFile, ImageOps

from vlmrl.caches.lru import ByteLRU
from vlmrl.types import Image, ImageItem

Pixels: TypeAlias = NDArray[np.uint8]
"""uint8 [H, W, 3], RGB, 0 to 255."""

MAX_PIXELS = 1 << 26
"""Images with a larger H × W are refused before decoding (67 million; a PNG of a few KB can claim billions)."""

INLINE_PIXELS = 1 << 14
"""Up to this size (128 × 128), hashing a decoded image takes less time than handing it to a thread."""

RECENT_BYTES = 256 << 20
"""Processed images that are kept alive although nothing else refers to them: the most recently used ones."""

ENCODED_HASH_BYTES = 65536 * (32 + 32)
"""Memory for the hashes of encoded images (files, bytes): room for 65,536 pairs of SHA-256 digest and image hash."""

WORKERS = 4
"""Threads that decode and process images."""

DECODE_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    SyntaxError,
    IndexError,
    OverflowError,
    EOFError,
    MemoryError,
    struct.error,
    zlib.error,
)
"""Exceptions that Pillow's decoders raise for broken files."""


class ImageError(Exception):
    """An image that cannot be decoded or processed. Ends its rollout as `image_error`; not an error of the run."""


def decode(source: Any) -> Pixels:
    """The pixels of an `Image.source`: a PIL image, uint8 [H, W, 3], encoded bytes, or a path. Raises `ImageError`.

    >>> decode(PILImage.new("L", (3, 2), 7)).shape
    (2, 3, 3)
    >>> decode(np.zeros((4, 4), np.uint8))
    Traceback (most recent call last):
    vlmrl.rendering.images.ImageError: an image array must be uint8 [H, W, 3], not uint8 [4, 4]
    """
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3:
            raise ImageError(f"an image array must be uint8 [H, W, 3], not {source.dtype} {list(source.shape)}")
        _check_size(source.shape[1], source.shape[0])
        return source.copy()
    if isinstance(source, PILImage.Image):
        return _decode_pil(source)
    if isinstance(source, bytes):
        return _decode_encoded(source)
    if isinstance(source, str | Path):
        return _decode_encoded(_read(source))
    raise ImageError(f"an image must be a PIL image, a uint8 array, bytes or a path, not {type(source).__name__}")


def image_hash(pixels: Pixels) -> str:
    """32 hex characters: SHA-256 of the RGB bytes and of "(width, height)". The `renderers` package uses the same hash.

    >>> image_hash(np.zeros((32, 32, 3), np.uint8))
    '4d7fc975f0b1832b9a3356b0492f265a'
    """
    digest = hashlib.sha256(pixels.tobytes())
    digest.update(str((pixels.shape[1], pixels.shape[0])).encode())
    return digest.hexdigest()[:32]


class ImageStore:
    """The images of one renderer. Thread-safe.

    `process` returns the image processor's output, `(mm_kwargs, placeholder tokens)`. It runs once per distinct image,
    and again only if the image was evicted in between.
    """

    def __init__(self, process: Callable[[Pixels], tuple[dict[str, np.ndarray], int]]) -> None:
        self._process = process
        self._lock = threading.Lock()
        self._items: WeakValueDictionary[str, ImageItem] = WeakValueDictionary()
        self._hash_of_part: WeakKeyDictionary[Image, str] = WeakKeyDictionary()
        self._pending: dict[str, Future[ImageItem]] = {}
        self._recent: ByteLRU[str, ImageItem] = ByteLRU(RECENT_BYTES, keep_newest=True)
        self._hash_of_encoded: ByteLRU[bytes, str] = ByteLRU(ENCODED_HASH_BYTES)
        self._workers = ThreadPoolExecutor(WORKERS, thread_name_prefix="images")

    def known(self, digest: str) -> ImageItem:
        """The item of a hash. The caller must keep the item alive."""
        return self._items[digest]

    def items(self, parts: Iterable[Image]) -> tuple[ImageItem, ...]:
        """One item per part. Blocks while images are decoded and processed. Raises `ImageError`."""
        return tuple(self._item(part) for part in parts)

    async def items_async(self, parts: Iterable[Image]) -> tuple[ImageItem, ...]:
        """Same as `items`, without blocking the event loop: threads decode and process new images."""
        parts = tuple(parts)
        found = {part: self._at_once(part) for part in parts}
        missing = [part for part, item in found.items() if item is None]
        loop = asyncio.get_running_loop()
        processed = await asyncio.gather(*(loop.run_in_executor(self._workers, self._item, part) for part in missing))
        made = dict(zip(missing, processed, strict=True))
        return tuple(found[part] or made[part] for part in parts)

    def _at_once(self, part: Image) -> ImageItem | None:
        """The item of a part, if finding it takes too little work for a thread; else None."""
        digest = self._hash_of_part.get(part)
        if digest is None and _is_decoded_and_small(part.source):
            digest = self._hash_of_part[part] = image_hash(decode(part.source))
        return self._find(digest)

    def _item(self, part: Image) -> ImageItem:
        item = self._find(self._hash_of_part.get(part))
        if item is None:
            item = self._item_of_source(part.source)
            self._hash_of_part[part] = item.hash
        return item

    def _item_of_source(self, source: Any) -> ImageItem:
        if not isinstance(source, bytes | str | Path):
            return self._intern(decode(source))
        # Sibling rollouts open the same file. Reading and hashing it takes far less time than decoding it.
        encoded = source if isinstance(source, bytes) else _read(source)
        key = hashlib.sha256(encoded).digest()
        item = self._find(self._hash_of_encoded.get(key))
        if item is None:
            item = self._intern(_decode_encoded(encoded))
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
            mm_kwargs, num_tokens = self._process(pixels)
        except BaseException as error:
            with self._lock:
                del self._pending[digest]
            mine.set_exception(error)
            raise
        pixels.setflags(write=False)
        for array in mm_kwargs.values():
            array.setflags(write=False)
        item = ImageItem(digest, pixels, mm_kwargs, num_tokens)
        with self._lock:
            self._items[digest] = item
            self._touch(item)
            del self._pending[digest]
        mine.set_result(item)
        return item

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


def _num_bytes(item: ImageItem) -> int:
    return item.pixels.nbytes + sum(array.nbytes for array in item.mm_kwargs.values())


def _is_decoded_and_small(source: Any) -> bool:
    if isinstance(source, np.ndarray):
        return source.size <= 3 * INLINE_PIXELS
    if isinstance(source, PILImage.Image) and not isinstance(source, ImageFile.ImageFile):
        return source.width * source.height <= INLINE_PIXELS
    return False


def _read(path: str | Path) -> bytes:
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise ImageError(f"the image file {path} cannot be read: {error.strerror}") from error


def _decode_encoded(encoded: bytes) -> Pixels:
    try:
        with PILImage.open(io.BytesIO(encoded)) as image:
            _check_size(image.width, image.height)
            return _decode_pil(ImageOps.exif_transpose(image))
    except (*DECODE_ERRORS, PILImage.DecompressionBombError, PILImage.DecompressionBombWarning) as error:
        raise ImageError(f"an encoded image of {len(encoded)} bytes cannot be decoded: {error}") from error


def _decode_pil(image: PILImage.Image) -> Pixels:
    _check_size(image.width, image.height)
    try:
        return np.array(_to_rgb(image))
    except DECODE_ERRORS as error:
        raise ImageError(f"an image of mode {image.mode} cannot be decoded: {error}") from error


def _to_rgb(image: PILImage.Image) -> PILImage.Image:
    if image.mode == "RGB":
        return image
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours; going straight to RGB warns
    if image.mode in ("I", "I;16", "I;16L", "I;16B", "I;16N"):
        samples = np.asarray(image)
        if samples.min() < 0 or samples.max() > 65535:
            raise ImageError(
                f"an image of mode {image.mode} has samples outside 16 bits: convert it to 8 bits per sample"
            )
        image = PILImage.fromarray(((samples.astype(np.uint32) + 128) // 257).astype(np.uint8))
    if image.mode == "F":
        raise ImageError("an image of mode F has no defined range: convert it to 8 bits per sample")
    return image.convert("RGB")


def _check_size(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise ImageError(f"an image of {width} × {height} pixels is empty")
    if width * height > MAX_PIXELS:
        raise ImageError(f"an image of {width} × {height} pixels is larger than {MAX_PIXELS} pixels: shrink it")
