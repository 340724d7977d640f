"""The images of one renderer: each distinct image is decoded and processed once, and becomes one `ImageItem`.

    Image part ──decode──▶ pixels [H, W, 3] ──hash──▶ known? ──process──▶ ImageItem, interned by its hash

An `Image` part is a value (item_store.py). A `PIL.Image` that is changed afterwards and passed in a new part is a
different image. So the store remembers parts by identity, but not their sources: siblings that share a PIL image wait
for each other while Pillow loads it, and each reads the pixels as they are then.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PILImage

from vlmrl.caches.lru import ByteLRU
from vlmrl.rendering.first_image import blanked, check_finite, has_tiles, probe_picture, refuse_blank_tiles
from vlmrl.rendering.images import Pixels, decode, image_errors, image_hash, lock_of, read_file
from vlmrl.rendering.item_store import ItemStore, Processed
from vlmrl.types import Image, ImageItem

INLINE_PIXELS = 1 << 14
"""Up to this size (128 × 128), hashing a decoded image takes less time than handing it to a thread."""

ENCODED_HASH_BYTES = 65536 * (32 + 32)
"""Memory for the hashes of encoded images (files, bytes): room for 65,536 pairs of SHA-256 digest and image hash."""


class ImageStore(ItemStore[Image, ImageItem]):
    """The images of one renderer. `process` runs the processor."""

    def __init__(
        self,
        process: Callable[[Pixels], Processed],
        processed_size: Callable[[Mapping[str, np.ndarray]], tuple[int, int] | None] = lambda mm_kwargs: None,
    ) -> None:
        """`processed_size` returns (width, height) of what `process` made of an image, where it can be told."""
        super().__init__("images")
        self._process = process
        self._processed_size = processed_size
        self._refuses_blank_tiles = False
        self._hash_of_encoded: ByteLRU[bytes, str] = ByteLRU(ENCODED_HASH_BYTES)

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
            return self._interned(decode(source))
        # Sibling rollouts open the same file. Reading and hashing it takes far less time than decoding it.
        encoded = source if isinstance(source, bytes) else read_file(source)
        key = hashlib.sha256(encoded).digest()
        with lock_of(key):
            item = self._find(self._hash_of_encoded.get(key))
            if item is None:
                item = self._interned(decode(encoded))
                self._hash_of_encoded.put(key, item.hash, len(key) + len(item.hash))
        return item

    def _interned(self, pixels: Pixels) -> ImageItem:
        digest = image_hash(pixels)
        return self._intern(digest, lambda: self._made(digest, pixels))

    def _made(self, digest: str, pixels: Pixels) -> ImageItem:
        """The item of an image, by the processor. Its arrays cannot be written to."""
        mm_kwargs, num_tokens, replacement = self._process(pixels)
        if self._refuses_blank_tiles:
            refuse_blank_tiles(pixels, mm_kwargs)
        processed_size = self._processed_size(mm_kwargs)
        for array in (pixels, *mm_kwargs.values()):
            array.setflags(write=False)
        return ImageItem(digest, pixels, mm_kwargs, num_tokens, processed_size, replacement)


def _is_decoded_and_small(source: Any) -> bool:
    """Not for subclasses: they may run the user's code, or read a file."""
    if type(source) is np.ndarray:
        return source.size <= 3 * INLINE_PIXELS
    if type(source) is PILImage.Image:
        return source.width * source.height <= INLINE_PIXELS
    return False
