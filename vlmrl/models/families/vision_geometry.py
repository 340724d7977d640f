"""Computes on the host what a vision tower derives from the sizes of the images.

A vision tower of transformers computes positions, the interpolation of its learned position grid and the bounds of the
images on the device that holds the sizes, and reads them back: on a GPU each read is a synchronization. It also accepts
them precomputed, under the names used here.

Left out: towers that derive more than these (windows, merged shapes). They compute everything themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.vision_utils import (
    get_vision_attention_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
)

from vlmrl.caches.lru import ByteLRU
from vlmrl.models.features import to_device

SIZES = ("image_grid_thw", "video_grid_thw")
"""The `mm_kwargs` names of int64 [items, 3]: time, height and width of each image or video in patches."""

_FRAMES: ByteLRU[tuple[object, ...], dict[str, np.ndarray]] = ByteLRU(64 << 20)
"""What is derived of a frame, by its size and the tower's settings: most images have few sizes. Derived for all patches
of a step at once, it would be work for several threads, which wait for one another on a busy host: at times 0.4 s
instead of 0.02 for sixteen images of a megapixel."""


def tower_arguments(tower: Any, sizes: Mapping[str, Tensor], device: torch.device) -> dict[str, Any]:
    """Arguments of `get_image_features` and `get_video_features` apart from pixels: `sizes` (the integers of
    `mm_kwargs`, on the host) and what is derived from them. A tower that derives other quantities gets only `sizes`, on
    its device."""
    # A tower with `interpolation_mode` derives exactly these: bounds, positions, and the grid's indices and weights.
    grids = [sizes[name] for name in SIZES if name in sizes]
    if not grids or not hasattr(tower, "interpolation_mode"):
        return {name: to_device(tensor.numpy(), device) for name, tensor in sizes.items()}
    (grid,) = grids
    bounds, longest = get_vision_attention_seqlens(grid, tower.config)
    derived = {"cu_seqlens": bounds.numpy(), **_of_patches(tower, grid.tolist())}
    arguments = {**sizes, **{name: to_device(array, device) for name, array in derived.items()}}
    return arguments if longest is None else {**arguments, "max_seqlen": longest}


def _of_patches(tower: Any, grid: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
    """What is derived for each of the P patches of all items: `position_ids` int64 [P, 2], `interp_indices` int64 and
    `interp_weights` float32 [P, taps]. The frames of an item are equal and follow one another."""
    frames = [frame for count, height, width in grid for frame in [_of_a_frame(tower, height, width)] * count]
    return {name: np.concatenate([frame[name] for frame in frames]) for name in frames[0]}


def _of_a_frame(tower: Any, height: int, width: int) -> dict[str, np.ndarray]:
    """The arrays of one frame of [height, width] patches."""
    side, mode, align = tower.num_grid_per_side, tower.interpolation_mode, tower.interpolation_align_corners
    merge = tower.spatial_merge_size

    def derive() -> dict[str, np.ndarray]:
        grid = torch.tensor([[1, height, width]])
        indices, weights = get_vision_interpolation_indices_and_weights(
            grid, side, mode=mode, align_corners=align, spatial_merge_size=merge
        )
        positions = get_vision_position_ids(grid, merge)
        derived = {"position_ids": positions, "interp_indices": indices, "interp_weights": weights}
        return {name: tensor.numpy() for name, tensor in derived.items()}

    key = (height, width, side, mode, align, merge)
    return _FRAMES.get_or_make(key, derive, lambda arrays: sum(array.nbytes for array in arrays.values()))
