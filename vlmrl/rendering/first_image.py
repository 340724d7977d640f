"""What one image shows of a processor before a run: whether it makes numbers, and tiles that the model would drop.

Idefics 3, SmolVLM and others pad a batch of images with tiles of zeros, and drop every tile whose values are all
exactly 0 before the vision tower. A picture becomes such a tile only where a colour is normalized to 0 (black, with
`image_mean` 0). Its image tokens would then have no features.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from vlmrl.errors import UserFault
from vlmrl.rendering.images import ImageError, Pixels

TILE_DIMS = 4
"""Least dimensions of an array of tiles: tiles, channels, height, width. Arrays of patches have fewer."""


def probe_picture() -> Pixels:
    """uint8 [64, 64, 3]; noise, of which no processor makes a blank tile."""
    return np.random.default_rng(0).integers(1, 255, (64, 64, 3), np.uint8)


def check_finite(mm_kwargs: Mapping[str, np.ndarray]) -> None:
    """Raise `UserFault` where a processor makes NaN or infinite values of noise: then it does so for every image."""
    for name, array in mm_kwargs.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise UserFault(
                f"it makes values of an image that are not finite ({name}), as with image_std=0 or an image_mean that "
                "is no number: use the preprocessor_config.json that belongs to the checkpoint"
            )


def has_tiles(mm_kwargs: Mapping[str, np.ndarray]) -> bool:
    """Whether a processor made tiles of an image, and not patches side by side.

    >>> has_tiles({"pixel_values": np.zeros((1, 2, 3, 8, 8))}), has_tiles({"pixel_values": np.zeros((256, 1536))})
    (True, False)
    """
    return any(_holds_tiles(array) for array in mm_kwargs.values())


def blanked(mm_kwargs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same image with nothing but zeros in its tiles."""
    return {name: np.zeros_like(array) if _holds_tiles(array) else array for name, array in mm_kwargs.items()}


def refuse_blank_tiles(pixels: Pixels, mm_kwargs: Mapping[str, np.ndarray]) -> None:
    """Raise `ImageError` for an image of which a tile holds nothing but zeros."""
    tiles = [array.reshape(-1, *array.shape[-3:]) for array in mm_kwargs.values() if _holds_tiles(array)]
    shown = [bool(tile.any()) for array in tiles for tile in array]
    if not all(shown):
        height, width = pixels.shape[:2]
        raise ImageError(
            f"an image of {width} × {height} is of one plain colour in {shown.count(False)} of its {len(shown)} tiles, "
            "which the image processor turns into zeros. The model takes such tiles for padding and drops them, so "
            "their image tokens would get no features: leave the image out, change a pixel in each such tile, or put "
            "the image_mean with which the model was trained into preprocessor_config.json"
        )


def _holds_tiles(array: np.ndarray) -> bool:
    return array.dtype.kind == "f" and array.ndim >= TILE_DIMS
