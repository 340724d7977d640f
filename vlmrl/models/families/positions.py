"""Position ids of the tokens of one sequence, in the geometry of the model.

A model family names its function in `model.vlm.positions`. Every function is causal: the positions of a prefix do not
depend on what follows it. So a growing conversation, and a prefix that several samples share, keep their positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Protocol

import numpy as np

from vlmrl.types import ImageItem, IntArray, Placeholder


class PositionFunction(Protocol):
    """Positions of a sequence of `length` tokens with these images: int64 [4, length].

    Row 0 counts the tokens from 0. Rows 1 to 3 are the rotary positions of time, height and width. transformers takes
    all four as `position_ids` [4, batch, length].
    """

    def __call__(self, length: int, placeholders: Sequence[Placeholder], images: Sequence[ImageItem]) -> IntArray: ...


def sequential(
    length: int, placeholders: Sequence[Placeholder], images: Sequence[ImageItem], spatial_merge_size: int
) -> IntArray:
    """0, 1, 2, … on all four rows, images or not.

    >>> sequential(3, (), (), 1).tolist()
    [[0, 1, 2], [0, 1, 2], [0, 1, 2], [0, 1, 2]]
    """
    return np.tile(np.arange(length, dtype=np.int64), (4, 1))


def mrope(
    length: int, placeholders: Sequence[Placeholder], images: Sequence[ImageItem], spatial_merge_size: int
) -> IntArray:
    """Multimodal rotary positions of Qwen2-VL and its successors (arXiv 2409.12191, section 2.1).

    A text token advances time, height and width together. An image token has the position where the image begins, plus
    its frame, row and column in the merged grid. The text after an image continues max(rows, columns) later.

    Example: two text tokens, an image of 2 × 4 patches (1 × 2 tokens after merging 2 × 2), one more text token.

    >>> item = ImageItem("ab", np.zeros((32, 64, 3), np.uint8), {"image_grid_thw": np.array([[1, 2, 4]])}, 2)
    >>> mrope(5, [Placeholder(2, 2, "ab")], [item], spatial_merge_size=2).tolist()
    [[0, 1, 2, 3, 4], [0, 1, 2, 2, 4], [0, 1, 2, 2, 4], [0, 1, 2, 3, 4]]
    """
    positions = sequential(length, placeholders, images, spatial_merge_size)
    rotary = positions[1:]
    for placeholder, image in zip(placeholders, images, strict=True):
        frames, rows, columns = (int(n) for n in image.mm_kwargs["image_grid_thw"][0])
        rows, columns = rows // spatial_merge_size, columns // spatial_merge_size
        assert not placeholder.gaps, "mrope lays image tokens out as one grid, so a placeholder must have no gaps"
        begin, end = placeholder.offset, placeholder.offset + placeholder.length
        start = int(rotary[0, begin])
        rotary[:, begin:end] = start + _grid(frames, rows, columns)
        rotary[:, end:] = start + max(rows, columns) + np.arange(length - end)
    return positions


@lru_cache(maxsize=256)
def _grid(frames: int, rows: int, columns: int) -> IntArray:
    """int64 [3, frames × rows × columns]; frame, row and column of each token, row by row."""
    return np.indices((frames, rows, columns), dtype=np.int64).reshape(3, -1)


POSITIONS: dict[str, Callable[..., IntArray]] = {
    "mrope": mrope,
    "sequential": sequential,
}
"""Name in `model.vlm.positions` → function. All of them have the signature of `mrope`."""


def position_function(name: str, spatial_merge_size: int = 1) -> PositionFunction:
    """The function of that name for a model that merges `spatial_merge_size`² patches into a token. `preflight` refuses
    other names than those in `POSITION_NAMES`."""
    return partial(POSITIONS[name], spatial_merge_size=spatial_merge_size)
