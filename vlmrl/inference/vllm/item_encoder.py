"""Encodes images and videos for servers, in the form that each server takes (image_fields.py)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

from vlmrl.caches.lru import ByteLRU
from vlmrl.config.model import Dtype
from vlmrl.inference.vllm.content_parts import picture_url
from vlmrl.inference.vllm.image_fields import ImageFields
from vlmrl.inference.vllm.wire import encode_item
from vlmrl.types import ImageItem, MMItem, Modality

log = logging.getLogger(__name__)

ENCODED_LIMIT_BYTES = 256 * 1024**2
"""Limit on the encoded images that are kept for the next server, or for one that has forgotten them."""


class ItemEncoder:
    """Encodes images for servers, and keeps the most recent results, up to `ENCODED_LIMIT_BYTES`."""

    def __init__(self, dtype: Dtype, sizes: Mapping[str, Any] = MappingProxyType({})) -> None:
        """`dtype` and `sizes` as for `wire.encode_item`."""
        self.dtype = dtype
        self._sizes = sizes
        self._kept: ByteLRU[tuple[str, ImageFields | None], bytes] = ByteLRU(ENCODED_LIMIT_BYTES, keep_newest=True)
        self._logged: set[tuple[Modality, str]] = set()

    async def encode(self, images: Collection[MMItem], fields: ImageFields | None) -> dict[str, bytes]:
        """Hash → output of `encode_item`, or without `fields` of `picture_url`, for the distinct items, all of one
        kind. Runs in a thread: an image takes milliseconds."""
        distinct = {image.hash: image for image in images}
        kept = {hash: self._kept.get((hash, fields)) for hash in distinct}
        encoded = {hash: data for hash, data in kept.items() if data is not None}
        missing = [image for image in distinct.values() if image.hash not in encoded]
        if missing:
            self._log_form(missing[0], fields)
            made = await asyncio.to_thread(lambda: {image.hash: self._encode(image, fields) for image in missing})
            for hash, data in made.items():
                self._kept.put((hash, fields), data, len(data))
            encoded |= made
        return encoded

    def _encode(self, image: MMItem, fields: ImageFields | None) -> bytes:
        if fields is not None:
            return encode_item(image, self.dtype, fields, self._sizes)
        assert isinstance(image, ImageItem), "the client refuses videos next to pictures"
        return picture_url(image)

    def _log_form(self, image: MMItem, fields: ImageFields | None) -> None:
        if fields is None:
            form = "pictures in content_parts"
        else:
            form = "tensors" if fields.are_tensors_of(image) else "pictures with digests"
        if (image.modality, form) not in self._logged:
            self._logged.add((image.modality, form))
            log.info("%ss go to the servers as %s", image.modality, form)
