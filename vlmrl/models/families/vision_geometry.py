"""Computes on the host what a vision tower derives from the sizes of the images.

A vision tower of transformers computes positions, the interpolation of its learned position grid and the bounds of the
images on the device that holds the sizes, and reads them back: on a GPU each read is a synchronization. It also accepts
them precomputed, under the names used here.

Left out: towers that derive more than these (windows, merged shapes). They compute everything themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.vision_utils import (
    get_vision_attention_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
)

from vlmrl.models.features import to_device

SIZES = ("image_grid_thw", "video_grid_thw")
"""The `mm_kwargs` names of int64 [items, 3]: time, height and width of each image or video in patches."""


def tower_arguments(tower: Any, sizes: Mapping[str, Tensor], device: torch.device) -> dict[str, Any]:
    """Arguments of `get_image_features` and `get_video_features` apart from pixels: `sizes` (the integers of
    `mm_kwargs`, on the host) and what is derived from them. A tower that derives other quantities gets only `sizes`, on
    its device."""
    # A tower with `interpolation_mode` derives exactly these: bounds, positions, and the grid's indices and weights.
    grids = [sizes[name] for name in SIZES if name in sizes]
    if not grids or not hasattr(tower, "interpolation_mode"):
        return {name: to_device(tensor.numpy(), device) for name, tensor in sizes.items()}
    (grid,), merge = grids, tower.spatial_merge_size
    bounds, longest = get_vision_attention_seqlens(grid, tower.config)
    indices, weights = get_vision_interpolation_indices_and_weights(
        grid,
        tower.num_grid_per_side,
        mode=tower.interpolation_mode,
        align_corners=tower.interpolation_align_corners,
        spatial_merge_size=merge,
    )
    derived = {
        "cu_seqlens": bounds,
        "position_ids": get_vision_position_ids(grid, merge),
        "interp_indices": indices,
        "interp_weights": weights,
    }
    arguments = {**sizes, **{name: to_device(tensor.numpy(), device) for name, tensor in derived.items()}}
    return arguments if longest is None else {**arguments, "max_seqlen": longest}
