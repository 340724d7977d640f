"""The distinct prefixes of many token sequences, laid out as the rows of one pass in depth-first order.

    samples                      rows                       segments
    S S S a b                    0 1 2 3 4                  [0 1 2]      parent -
    S S S a c                    0 1 2 3 5                  [3]          parent 0
    S S S d                      0 1 2 6                    [4] [5]      parent 1
                                                            [6]          parent 0

Sequences are sorted, so each one adds only the rows after its longest common prefix with the sequence before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vlmrl.types import IntArray, Placeholder


class ImageKeys:
    """Numbers the distinct images, so that equal tokens with different pixels are different prefixes."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[str, ...], int] = {}

    def keys(self, token_ids: IntArray, placeholders: Sequence[Placeholder]) -> IntArray:
        """int64 [L]: the token id; on the image tokens of a placeholder, −1 − (number of its image). Images with no
        token between them count as one: where the tokens of an image attend to each other, they also attend to those of
        the next.

        >>> place = Placeholder(1, 3, "ab", gaps=((1, 1),))
        >>> ImageKeys().keys(np.array([5, 9, 8, 9, 7]), [place]).tolist()
        [5, -1, 8, -1, 7]
        """
        keys = token_ids.copy()
        for run in _neighbors(placeholders):
            number = self._numbers.setdefault(tuple(p.hash for p in run), len(self._numbers))
            for p in run:
                keys[p.offset : p.offset + p.length][p.has_feature] = -1 - number
        return keys


def _neighbors(placeholders: Sequence[Placeholder]) -> list[list[Placeholder]]:
    """`placeholders` in lists of those that follow each other without a token between them."""
    runs: list[list[Placeholder]] = []
    for p in placeholders:
        if runs and runs[-1][-1].offset + runs[-1][-1].length == p.offset:
            runs[-1].append(p)
        else:
            runs.append([p])
    return runs


def image_ends(types: IntArray) -> IntArray:
    """int64 [n]; for each of n neighboring tokens the index of the last token of its run of image tokens; for a text
    token its own index. `types` int64 [n] is 0 on text.

    >>> image_ends(np.array([0, 1, 1, 0, 1])).tolist()
    [0, 2, 2, 3, 4]
    """
    index = np.arange(len(types))
    is_last = np.append((types[:-1] == 0) | (types[1:] == 0), True)
    return np.minimum.accumulate(np.where(is_last, index, len(types))[::-1])[::-1]


def sort_key(keys: IntArray) -> bytes:
    """Bytes with the order and the common prefixes of `keys` (big-endian, shifted to be unsigned)."""
    return (keys + (1 << 62)).astype(">i8").tobytes()


def common_prefix(a: IntArray, b: IntArray) -> int:
    """Length of the longest common prefix.

    >>> common_prefix(np.array([1, 2, 3]), np.array([1, 2, 4, 5]))
    2
    """
    n = min(len(a), len(b))
    differ = a[:n] != b[:n]
    return int(differ.argmax()) if differ.any() else n


@dataclass(eq=False)
class PrefixTree:
    """One row per distinct token of sorted sequences."""

    num_rows: int
    rows: list[IntArray]
    """Per sequence, int64 [L]: the row of each of its tokens."""
    new_from: list[int]
    """Per sequence: the index of its first token that is not shared with the sequence before it."""
    segments: list[tuple[int, int, int]]
    """(parent, first row, end row) in depth-first order. Branches begin only at the end of a segment."""


@dataclass(frozen=True, eq=False)
class Segment:
    """A run of tokens at whose end only branches begin. Segments are listed in depth-first order, parents first."""

    parent: int
    """Index of the segment before it on the path; -1 at a root."""
    slots: np.ndarray
    """int64 [n]; the slots of its keys and values."""
    rows: np.ndarray
    """int64 [n]; its query rows, ascending and contiguous; empty [0] where the keys are cached already."""
    image_ends: np.ndarray | None = None
    """int64 [n]; `image_ends` of its tokens. None where no row needs it. No branch begins inside a run of image tokens,
    so each run lies in one segment, apart from a cached beginning."""

    def last_seen(self, image_runs: bool) -> IntArray:
        """int64 [rows]; for each row the index in the segment of the last token that it attends to: its own or, with
        `image_runs`, that of the last token of its run of image tokens."""
        if image_runs and len(self.rows):
            assert self.image_ends is not None, "the segment was made for a model without attention among image tokens"
            return self.image_ends
        return np.arange(len(self.rows))


def depths(segments: Sequence[Segment]) -> list[int]:
    """For each segment the number of tokens before it on its path. Parents stand before their children."""
    found: list[int] = []
    for s in segments:
        found.append(found[s.parent] + len(segments[s.parent].slots) if s.parent >= 0 else 0)
    return found


def build_tree(sequences: Sequence[IntArray], *, share: bool = True) -> PrefixTree:
    """Lay out `sequences`, which must be distinct and sorted by `sort_key`. With `share=False` no row is shared.

    >>> tree = build_tree([np.array([7, 7, 1, 2]), np.array([7, 7, 1, 3]), np.array([7, 7, 4])])
    >>> [r.tolist() for r in tree.rows], tree.segments
    ([[0, 1, 2, 3], [0, 1, 2, 4], [0, 1, 5]], [(-1, 0, 2), (0, 2, 3), (1, 3, 4), (1, 4, 5), (0, 5, 6)])
    """
    rows: list[IntArray] = []
    new_from: list[int] = []
    num_rows = 0
    parent_row: dict[int, int] = {}
    """First row of each added run → the row before it on its path; -1 at a root."""
    cuts: set[int] = set()
    """Rows after which a branch begins."""
    for i, sequence in enumerate(sequences):
        shared = common_prefix(sequences[i - 1], sequence) if i and share else 0
        assert i == 0 or not share or shared < len(sequence), "sequences must be distinct and sorted"
        before = int(rows[i - 1][shared - 1]) if shared else -1
        cuts.add(before)
        parent_row[num_rows] = before
        added = np.arange(num_rows, num_rows + len(sequence) - shared)
        rows.append(np.concatenate([rows[i - 1][:shared], added]) if shared else added)
        new_from.append(shared)
        num_rows += len(added)
    starts = sorted(({0} | parent_row.keys() | {row + 1 for row in cuts}) - {num_rows})
    segment_ending_at: dict[int, int] = {}
    segments: list[tuple[int, int, int]] = []
    for start, end in zip(starts, [*starts[1:], num_rows], strict=True):
        row_before = parent_row.get(start, start - 1)
        segments.append((segment_ending_at[row_before] if row_before >= 0 else -1, start, end))
        segment_ending_at[end - 1] = len(segments) - 1
    return PrefixTree(num_rows, rows, new_from, segments)
