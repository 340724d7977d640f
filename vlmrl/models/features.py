"""Vision features, which are the vision tower's output per distinct image or video; their cache; and arrays on their
way to the device."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from vlmrl.caches.lru import ByteLRU
from vlmrl.types import MMItem

Levels: TypeAlias = list[Tensor]
"""float [features, hidden] each: the features that replace the placeholders, then the deepstack levels, if any."""


@dataclass(frozen=True, eq=False)
class VisionFeatures:
    """Features of the distinct images and videos of a pass. F is the sum of their `num_tokens`."""

    levels: Levels
    """float [F, hidden] each."""
    first: dict[str, int]
    """Hash of an item → index of its first feature."""


def first_features(items: Sequence[MMItem]) -> dict[str, int]:
    """`VisionFeatures.first` for items whose features follow each other."""
    first, total = {}, 0
    for item in items:
        first[item.hash] = total
        total += item.num_tokens
    return first


class FeatureCache:
    """Features of the most recently used images and videos, up to `limit_bytes`; None for no limit.

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
        self, items: Sequence[MMItem], version: int, encode: Callable[[Sequence[MMItem]], Levels]
    ) -> tuple[VisionFeatures, int]:
        """Features of `items` (distinct, one or more), and how many of the items had to be encoded.

        `encode` returns the levels of the items that it is given. It is called at most once, with the items that are
        not in the cache.
        """
        if version != self._version:
            self._version = version
            self._entries.clear()
        kept = {item.hash: self._entries.get(item.hash) for item in items}
        found = {hash: levels for hash, levels in kept.items() if levels is not None}
        missing = [item for item in items if item.hash not in found]
        if missing:
            lengths = [item.num_tokens for item in missing]
            parts = [torch.split(level, lengths) for level in encode(missing)]
            for item, own in zip(missing, zip(*parts, strict=True), strict=True):
                found[item.hash] = list(own)
                num_bytes = sum(level.nbytes for level in own)
                if num_bytes <= self._entries.limit_bytes:
                    # A view of a larger tensor would keep all of that tensor alive.
                    self._entries.put(item.hash, [level.clone() for level in own], num_bytes)
        levels = [torch.cat(level) for level in zip(*(found[item.hash] for item in items), strict=True)]
        return VisionFeatures(levels, first_features(items)), len(missing)

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
