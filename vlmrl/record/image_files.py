"""Write images/<hash>.png: each distinct image, and each distinct frame of a video, once.

The PNG of an image holds digests of what its processor made of it. Those of a video are in its row (rollout_schema.py),
because a frame may be part of several videos.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import orjson
import PIL.Image
from PIL.PngImagePlugin import PngInfo

from vlmrl.record.files import write_atomically
from vlmrl.types import ImageItem, MMItem

DIGESTS = "vlmrl:mm_kwargs"
"""Keyword of the PNG text chunk that holds `mm_kwargs_digests`."""


def mm_kwargs_digests(item: MMItem) -> dict[str, str]:
    """Name → dtype, shape and start of the SHA-256 of each processor output of an item. mode=replay compares them with
    those of the installed processor.

    >>> grid = np.array([[1, 2, 2]])
    >>> mm_kwargs_digests(ImageItem("ab", np.zeros((32, 32, 3), np.uint8), {"image_grid_thw": grid}, 1))
    {'image_grid_thw': 'int64[1, 3] 8e593fdee7021d9c'}
    """
    return {
        name: f"{array.dtype}{list(array.shape)} {hashlib.sha256(array.tobytes()).hexdigest()[:16]}"
        for name, array in sorted(item.mm_kwargs.items())
    }


def recorded_digests(picture: PIL.Image.Image) -> dict[str, str] | None:
    """The `mm_kwargs_digests` in a PNG of a run; None where it has none."""
    text = picture.info.get(DIGESTS)
    return None if text is None else orjson.loads(text)


def pictures_of(item: MMItem) -> dict[str, ImageItem | np.ndarray]:
    """Hash → what becomes a file: an image, or each frame of a video as uint8 [H, W, 3]."""
    if isinstance(item, ImageItem):
        return {item.hash: item}
    return dict(zip(item.frame_hashes, item.frames, strict=True))


def write_png(path: Path, picture: ImageItem | np.ndarray) -> None:
    """Write a lossless RGB PNG; that of an image has the digests of its tensors in a text chunk. Raises OSError."""
    note = PngInfo()
    if isinstance(picture, ImageItem):
        note.add_text(DIGESTS, orjson.dumps(mm_kwargs_digests(picture)).decode())
        picture = picture.pixels
    made = PIL.Image.fromarray(picture)
    write_atomically(path, lambda file: made.save(file, format="PNG", compress_level=1, pnginfo=note))
