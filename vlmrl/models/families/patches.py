"""The picture in the patches of an image processor, for people to look at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray


def picture_of(mm_kwargs: Mapping[str, np.ndarray], image_processor: Any) -> NDArray[np.uint8] | None:
    """uint8 [h · P, w · P, 3]: the picture that one image's patches hold; of a video its first frame.

    `pixel_values` is float32 [h · w, 3 · frames · P · P], normalized by channel, in the order of blocks of M · M
    patches that become one token; `image_grid_thw` is (1, h, w). None where the processor's output has another form.
    """
    values, grid = mm_kwargs.get("pixel_values"), mm_kwargs.get("image_grid_thw")
    names = ("patch_size", "merge_size", "temporal_patch_size")
    sizes = [getattr(image_processor, name, None) for name in names]
    if values is None or grid is None or not all(isinstance(size, int) for size in sizes):
        return None
    patch, merge, frames = (int(size) for size in sizes if size is not None)
    count, rows, columns = (int(number) for number in grid[0])
    blocks = values.reshape(count, rows // merge, columns // merge, merge, merge, 3, frames, patch, patch)
    first = blocks[0, :, :, :, :, :, 0].transpose(0, 2, 5, 1, 3, 6, 4)
    picture = first.reshape(rows * patch, columns * patch, 3)
    shown = picture * np.asarray(image_processor.image_std) + np.asarray(image_processor.image_mean)
    levels: NDArray[np.uint8] = np.clip(np.round(shown * 255), 0, 255).astype(np.uint8)
    return levels
