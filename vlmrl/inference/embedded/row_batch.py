"""The rows that are decoded at once: they leave when they have ended, and others may enter.

    entering ─▶ rows ─▶ left        a row is a request; its prompt is in the KV cache, once for all rows that have it

Both happen where results are read (row_decoding.py), so the steps between two readings have the same rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from vlmrl.inference.embedded.prefill import DistinctPrompt, Prefilled
from vlmrl.inference.embedded.prefill_chunks import whole_segments
from vlmrl.inference.embedded.requests import Request
from vlmrl.inference.embedded.sampled_row import SampledRow
from vlmrl.inference.embedded.shared_prefixes import SharedPrefixes
from vlmrl.models.attention.prefix_tree import Segment, sort_key
from vlmrl.types import Completion, IntArray


@dataclass(frozen=True, eq=False)
class Entering:
    """Requests whose prompts have just been computed."""

    requests: Sequence[Request]
    prompts: Sequence[DistinctPrompt]
    """Distinct and sorted."""
    request_prompt: Sequence[int]
    """Per request, the index of its prompt."""
    prefilled: Prefilled


class Company(Protocol):
    """What a batch that runs has to do with other requests."""

    def take(self, running: int) -> Entering | None:
        """What enters beside `running` rows, if anything does. Called at every reading."""

    def ended(self, request: Request, completion: Completion) -> None:
        """Take the completion of a row that has left."""


class RowBatch:
    """Rows, in the order of their prompts."""

    def __init__(
        self,
        prompts: Sequence[DistinctPrompt],
        slots: Sequence[IntArray],
        segments: Sequence[Segment],
        rows: list[SampledRow],
    ) -> None:
        """`slots`: of each prompt, in the KV cache; `segments`: the prefix tree of the prompts."""
        self.prompts, self.slots, self.rows = prompts, slots, rows
        self.shared = SharedPrefixes(prompts, segments, [row.prompt for row in rows])
        """What of the prompts is read once for several rows."""
        self.left: list[SampledRow] = []
        """Rows that the device may still be computing, although they have left."""

    @staticmethod
    def of(entering: Entering, row: Callable[[Request, int], SampledRow]) -> RowBatch:
        """A batch of requests; `row` makes one from a request and the index of its prompt."""
        order = sorted(range(len(entering.requests)), key=entering.request_prompt.__getitem__)
        rows = [row(entering.requests[number], entering.request_prompt[number]) for number in order]
        prefilled = entering.prefilled
        return RowBatch(entering.prompts, prefilled.slots, prefilled.segments, rows)

    def joined(self, other: RowBatch) -> RowBatch:
        """The rows of both. A prompt of one may begin as a prompt of the other does, and share what is read once."""
        known: dict[bytes, tuple[DistinctPrompt, IntArray]] = {}
        keys: list[tuple[bytes, SampledRow]] = []
        for batch in (self, other):
            for row in batch.rows:
                prompt = batch.prompts[row.prompt]
                key = sort_key(prompt.keys)
                known.setdefault(key, (prompt, batch.slots[row.prompt]))
                keys.append((key, row))
        order = {key: index for index, key in enumerate(sorted(known))}
        for key, row in keys:
            row.prompt = order[key]
        prompts, slots = [known[key][0] for key in order], [known[key][1] for key in order]
        rows = sorted((row for _, row in keys), key=lambda row: row.prompt)
        return RowBatch(prompts, slots, whole_segments(prompts, slots), rows)

    def take_ended(self) -> list[SampledRow]:
        """Have the rows that have ended leave → these rows."""
        ended = [row for row in self.rows if row.is_finished]
        self.rows = [row for row in self.rows if not row.is_finished]
        self.left += ended
        return ended
