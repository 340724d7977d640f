"""Position ids of the tokens of one sequence, in the geometry of the model.

A model family names its function in `model.vlm.positions`. Every function is causal: the positions of a prefix do not
depend on what follows it. So a growing conversation, and a prefix that several samples share, keep their positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Protocol

import numpy as np

from vlmrl.types import IntArray, MMItem, Placeholder

SECONDS = "second_per_grid_ts"
"""The `mm_kwargs` name of float32 [1]: seconds between two frames of a video as the vision tower sees them. Families
that have it space the frames' positions by it; the vision tower does not take it."""


class PositionFunction(Protocol):
    """Positions of a sequence of `length` tokens with these images and videos: int64 [4, length].

    Row 0 counts the tokens from 0. Rows 1 to 3 are the rotary positions of time, height and width. transformers takes
    all four as `position_ids` [4, batch, length].
    """

    def __call__(self, length: int, placeholders: Sequence[Placeholder], items: Sequence[MMItem]) -> IntArray: ...


def sequential(
    length: int,
    placeholders: Sequence[Placeholder],
    items: Sequence[MMItem],
    spatial_merge_size: int,
    tokens_per_second: int,
) -> IntArray:
    """0, 1, 2, … on all four rows, images or not.

    >>> sequential(3, (), (), 1, 1).tolist()
    [[0, 1, 2], [0, 1, 2], [0, 1, 2], [0, 1, 2]]
    """
    return np.tile(np.arange(length, dtype=np.int64), (4, 1))


def mrope(
    length: int,
    placeholders: Sequence[Placeholder],
    items: Sequence[MMItem],
    spatial_merge_size: int,
    tokens_per_second: int,
) -> IntArray:
    """Multimodal rotary positions of Qwen2-VL and its successors (arXiv 2409.12191, section 2.1).

    A text token advances time, height and width together. An image token has the position where the image begins, plus
    its frame, row and column in the merged grid. The text after an image continues max(rows, columns) later.

    The frames of a video stand one after another in a grid of their own. Families that write a time before each frame
    (Qwen3-VL) begin each frame where the text before it ended. Qwen2.5-VL spaces the frames of one grid by seconds:
    `tokens_per_second` × seconds between frames, rounded down (arXiv 2502.13923, section 2.1.2).

    Example: two text tokens, an image of 2 × 4 patches (1 × 2 tokens after merging 2 × 2), one more text token.

    >>> from vlmrl.types import ImageItem
    >>> item = ImageItem("ab", np.zeros((32, 64, 3), np.uint8), {"image_grid_thw": np.array([[1, 2, 4]])}, 2)
    >>> mrope(5, [Placeholder(2, 2, "ab")], [item], spatial_merge_size=2, tokens_per_second=1).tolist()
    [[0, 1, 2, 3, 4], [0, 1, 2, 2, 4], [0, 1, 2, 2, 4], [0, 1, 2, 3, 4]]
    """
    positions = sequential(length, placeholders, items, spatial_merge_size, tokens_per_second)
    rotary = positions[1:]
    for placeholder, item in zip(placeholders, items, strict=True):
        _, rows, columns = (int(n) for n in item.mm_kwargs[f"{item.modality}_grid_thw"][0])
        rows, columns = rows // spatial_merge_size, columns // spatial_merge_size
        seconds = item.mm_kwargs.get(SECONDS)
        interval = 1.0 if seconds is None else tokens_per_second * float(seconds[0])
        for begin, end in _runs(placeholder):
            start = int(rotary[0, begin])
            rotary[:, begin:end] = start + _grid((end - begin) // (rows * columns), rows, columns, interval)
            rotary[:, end:] = start + max(rows, columns) + np.arange(length - end)
    return positions


def _runs(placeholder: Placeholder) -> list[tuple[int, int]]:
    """(begin, end) of the tokens between the gaps of a placeholder.

    >>> _runs(Placeholder(10, 7, "ab", gaps=((2, 3),)))
    [(10, 12), (15, 17)]
    """
    begins = [0, *(start + length for start, length in placeholder.gaps)]
    ends = [*(start for start, _ in placeholder.gaps), placeholder.length]
    return [(placeholder.offset + begin, placeholder.offset + end) for begin, end in zip(begins, ends, strict=True)]


@lru_cache(maxsize=256)
def _grid(frames: int, rows: int, columns: int, interval: float) -> IntArray:
    """int64 [3, frames × rows × columns]; frame × `interval`, row and column of each token, row by row.

    >>> _grid(2, 1, 2, 2.5).tolist()
    [[0, 0, 2, 2], [0, 0, 0, 0], [0, 1, 0, 1]]
    """
    grid = np.indices((frames, rows, columns), dtype=np.int64).reshape(3, -1)
    # float32, as transformers multiplies them: 5 × 0.6 rounds up there.
    grid[0] = (grid[0].astype(np.float32) * np.float32(interval)).astype(np.int64)
    return grid


POSITIONS: dict[str, Callable[..., IntArray]] = {
    "mrope": mrope,
    "sequential": sequential,
}
"""Name in `model.vlm.positions` → function. All of them have the signature of `mrope`."""


def position_function(name: str, spatial_merge_size: int = 1, tokens_per_second: int = 1) -> PositionFunction:
    """The function of that name for a model that merges `spatial_merge_size`² patches into a token, and counts
    `tokens_per_second` positions a second where it knows the seconds of a video. `preflight` refuses other names than
    those in `POSITION_NAMES`."""
    return partial(POSITIONS[name], spatial_merge_size=spatial_merge_size, tokens_per_second=tokens_per_second)
