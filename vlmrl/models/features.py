"""Image features, which are the vision tower's output per distinct image; their cache; and arrays on their way to the
device."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from vlmrl.caches.lru import ByteLRU
from vlmrl.types import ImageItem

Levels: TypeAlias = list[Tensor]
"""float [features, hidden] each: the features that replace the placeholders, then the deepstack levels, if any."""


@dataclass(frozen=True, eq=False)
class ImageFeatures:
    """Features of the distinct images of a pass. F is the sum of their `num_tokens`."""

    levels: Levels
    """float [F, hidden] each."""
    first: dict[str, int]
    """Image hash → index of its first feature."""


def first_features(images: Sequence[ImageItem]) -> dict[str, int]:
    """`ImageFeatures.first` for images whose features follow each other."""
    first, total = {}, 0
    for image in images:
        first[image.hash] = total
        total += image.num_tokens
    return first


class FeatureCache:
    """Features of the most recently used images, up to `limit_bytes`; None for no limit.

    All of them belong to one version of the vision tower's weights: another version clears the cache.
    """

    def __init__(self, limit_bytes: int | None) -> None:
        self._version: int | None = None
        self._entries: ByteLRU[str, Levels] = ByteLRU(sys.maxsize if limit_bytes is None else limit_bytes)

    @property
    def num_bytes(self) -> int:
        """Bytes of the features that are kept."""
        return self._entries.num_bytes

    def encode(
        self, images: Sequence[ImageItem], version: int, encode: Callable[[Sequence[ImageItem]], Levels]
    ) -> tuple[ImageFeatures, int]:
        """Features of `images` (distinct, one or more), and how many of the images had to be encoded.

        `encode` returns the levels of the images that it is given. It is called at most once, with the images that are
        not in the cache.
        """
        if version != self._version:
            self._version = version
            self._entries.clear()
        kept = {image.hash: self._entries.get(image.hash) for image in images}
        found = {hash: levels for hash, levels in kept.items() if levels is not None}
        missing = [image for image in images if image.hash not in found]
        if missing:
            lengths = [image.num_tokens for image in missing]
            parts = [torch.split(level, lengths) for level in encode(missing)]
            for image, own in zip(missing, zip(*parts, strict=True), strict=True):
                found[image.hash] = list(own)
                num_bytes = sum(level.nbytes for level in own)
                if num_bytes <= self._entries.limit_bytes:
                    # A view of a larger tensor would keep all of that tensor alive.
                    self._entries.put(image.hash, [level.clone() for level in own], num_bytes)
        levels = [torch.cat(level) for level in zip(*(found[image.hash] for image in images), strict=True)]
        return ImageFeatures(levels, first_features(images)), len(missing)

    def clear(self) -> None:
        """Remove all features."""
        self._entries.clear()


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """`array` as a tensor of the same shape and dtype on `device`. On a CPU the tensor may share the array's memory."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    # A copy from pinned memory does not wait for the kernels that run on the device.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def concatenate_on(arrays: Sequence[np.ndarray], device: torch.device) -> Tensor:
    """Float32 `arrays`, concatenated along their first dimension, on `device`.

    The host copies each array once: the pixels of a micro-batch are tens of megabytes, and a slow host leaves the GPU
    idle.
    """
    shape = (sum(map(len, arrays)), *arrays[0].shape[1:])
    together = torch.empty(shape, dtype=torch.float32, pin_memory=device.type == "cuda")
    np.concatenate(arrays, out=together.numpy())
    return together.to(device, non_blocking=True)
