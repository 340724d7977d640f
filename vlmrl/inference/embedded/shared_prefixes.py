"""Which parts of the prompts of a batch are read once for several rows, and which by each row for itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlmrl.inference.embedded.prefill import DistinctPrompt
from vlmrl.models.attention.decode import SEGMENT_FIELDS
from vlmrl.models.attention.prefix_tree import Segment, depths
from vlmrl.types import IntArray

MIN_SAVED_KEYS = 128
"""A segment is shared where that saves at least this many reads of a key: (rows below it − 1) × its tokens. Parts of a
prompt that is not shared cost 8 % (benchmarks/shared_prefix.md, 256 groups of one)."""


@dataclass(eq=False)
class _Shared:
    """Tokens that several rows read once."""

    prompts: tuple[int, int]
    """The first prompt below it, and the end of the prompts below it."""
    slots: IntArray
    """int64 [n]."""
    first_depth: int
    level: int
    """Shared tokens before it on its path, in pieces like this one."""


class SharedPrefixes:
    """The shared parts of `prompts`, whose prefix tree is `segments`, for rows with the prompts `row_prompts`."""

    def __init__(
        self, prompts: Sequence[DistinctPrompt], segments: Sequence[Segment], row_prompts: Sequence[int]
    ) -> None:
        rows_of = np.bincount(row_prompts, minlength=len(prompts))
        below: list[list[int]] = [[] for _ in segments]
        for index, prompt in enumerate(prompts):
            for number in _path(segments, prompt.segment):
                below[number].append(index)
        starts = depths(segments)
        place: dict[int, _Shared] = {}
        self._shared: list[_Shared] = []
        for index, segment in enumerate(segments):
            above = place.get(segment.parent)
            rows = int(rows_of[below[index]].sum())
            saved = (rows - 1) * len(segment.slots)
            if saved < MIN_SAVED_KEYS or (segment.parent >= 0 and above is None):
                continue
            members = below[index][0], below[index][-1] + 1
            if above is not None and above.prompts == members:
                above.slots = np.concatenate([above.slots, segment.slots])
                place[index] = above
                continue
            level = 0 if above is None else above.level + 1
            place[index] = _Shared(members, segment.slots, starts[index], level)
            self._shared.append(place[index])
        self.private: list[IntArray] = [
            np.concatenate(
                [
                    np.empty(0, np.int64),
                    *(segments[i].slots for i in reversed(_path(segments, prompt.segment)) if i not in place),
                ]
            )
            for prompt in prompts
        ]
        """Per prompt, int64: the slots that each row reads for itself. They follow the shared ones."""

    @property
    def levels(self) -> int:
        """How many shared parts follow each other at most."""
        return max((each.level + 1 for each in self._shared), default=0)

    @property
    def most_keys(self) -> int:
        """Slots of the longest shared part."""
        return max((len(each.slots) for each in self._shared), default=0)

    @property
    def slots(self) -> NDArray[np.int32]:
        """int32 [n]; `DecodeTables.segment_slots`."""
        return np.concatenate([np.empty(0, np.int32), *(each.slots.astype(np.int32) for each in self._shared)])

    def table(self, row_prompts: IntArray) -> NDArray[np.int32]:
        """int32 [shared parts, 6]; `DecodeTables.segments` for rows whose prompts are `row_prompts`, ascending."""
        found = np.zeros((len(self._shared), SEGMENT_FIELDS), np.int32)
        offset = 0
        for number, each in enumerate(self._shared):
            first, end = np.searchsorted(row_prompts, each.prompts)
            found[number] = first, end, offset, len(each.slots), each.first_depth, each.level
            offset += len(each.slots)
        return found


def most_rows(table: NDArray[np.int32]) -> int:
    """`DecodeTables.most_rows` for the segments of `table`, a power of two: few sizes, few codes."""
    return 1 << (int((table[:, 1] - table[:, 0]).max(initial=1)) - 1).bit_length()


def _path(segments: Sequence[Segment], last: int) -> list[int]:
    """The segments from `last` up to its root."""
    path = []
    while last >= 0:
        path.append(last)
        last = segments[last].parent
    return path
