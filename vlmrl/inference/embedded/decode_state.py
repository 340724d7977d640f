"""The tensors of a decode step: what R rows read and write, at addresses that stay while rows leave and batches change.

A CUDA graph of a step replays the same reads and writes on the same addresses. So everything that changes between steps
lies in these tensors, they are allocated once for the largest batch so far, and a step of fewer rows uses the first
ones.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlmrl.models.attention.decode import SEGMENT_FIELDS, DecodeTables
from vlmrl.models.attention.row_states import RowStates
from vlmrl.types import FloatArray, IntArray


@dataclass(frozen=True, eq=False)
class Rows:
    """One row per request that is sampled. R is the number of rows that there is room for."""

    token: Tensor
    """int64 [R]; the newest token, the input of the next step. 0 where the row is not alive."""
    position: Tensor
    """int64 [R, 4]; its text position and its MRoPE positions."""
    slot: Tensor
    """int64 [R]; where its keys and values are written; a slot that no row reads where the row is not alive."""
    alive: Tensor
    """bool [R]; whether the row samples on."""
    count: Tensor
    """int64 [R]; tokens sampled."""
    limit: Tensor
    """int64 [R]; most tokens to sample."""
    private: Tensor
    """int64 [R]; tokens of the prompt in the row's own part."""
    stop_ids: Tensor
    """int64 [R, stop tokens]; −1 where a row has fewer."""
    uniforms: Tensor
    """float64 [R, tokens] in [0, 1); one number per token that is sampled."""
    temperature: Tensor
    """float32 [R]; 1.0 where the row is greedy."""
    is_greedy: Tensor
    """bool [R]."""
    shape: Tensor
    """int64 [R]; see `Draw.shape`."""
    own_slots: Tensor
    """int32 [R, C]; see `DecodeTables`."""
    own_length: Tensor
    """int32 [R]."""
    depth: Tensor
    """int32 [R]."""


@dataclass(frozen=True)
class Room:
    """Sizes of the tensors."""

    rows: int
    own: int
    """Tokens of a row's own part."""
    new: int
    """Tokens that a row samples."""
    stop_ids: int
    segments: int
    segment_slots: int
    steps: int
    """Steps between two readings."""

    def with_at_least(self, other: Room) -> Room:
        """Room for both, in powers of two where it grows: batches of slightly different sizes keep their tensors.

        >>> Room(4, 10, 8, 1, 1, 1, 2).with_at_least(Room(3, 11, 8, 1, 1, 1, 2)).own
        16
        """
        found = {}
        for each in fields(self):
            have, needed = getattr(self, each.name), getattr(other, each.name)
            found[each.name] = have if have >= needed else 1 << (needed - 1).bit_length()
        return Room(**found)


@dataclass(frozen=True, eq=False)
class Results:
    """Copies of what some steps have sampled, on their way from the device."""

    sampled: Tensor
    """int64 [steps, R]."""
    logprobs: Tensor
    """float32 [steps, R]; natural-log probabilities."""
    count: Tensor
    """int64 [R]; see `Rows`, as after the last of the steps."""
    alive: Tensor
    """bool [R]; likewise."""
    arrived: torch.cuda.Event | None
    """None on a CPU."""

    def arrays(self) -> tuple[IntArray, FloatArray, IntArray, NDArray[np.bool_]]:
        """Tokens [R, steps], logprobs [R, steps], count and alive, as soon as they are there."""
        if self.arrived is not None:
            self.arrived.synchronize()
        token_ids, logprobs = (each.t().contiguous().numpy() for each in (self.sampled, self.logprobs))
        return token_ids, logprobs, self.count.numpy(), self.alive.numpy()


class DecodeState:
    """All tensors of a decode step for batches that fit into `room`."""

    def __init__(self, room: Room, device: torch.device) -> None:
        self.room = room
        count = room.rows

        def new(dtype: torch.dtype, *sizes: int) -> Tensor:
            return torch.zeros(sizes, dtype=dtype, device=device)

        self.rows = Rows(
            token=new(torch.int64, count),
            position=new(torch.int64, count, 4),
            slot=new(torch.int64, count),
            alive=new(torch.bool, count),
            count=new(torch.int64, count),
            limit=new(torch.int64, count),
            private=new(torch.int64, count),
            stop_ids=new(torch.int64, count, room.stop_ids),
            uniforms=new(torch.float64, count, room.new),
            temperature=new(torch.float32, count),
            is_greedy=new(torch.bool, count),
            shape=new(torch.int64, count),
            own_slots=new(torch.int32, count, room.own),
            own_length=new(torch.int32, count),
            depth=new(torch.int32, count),
        )
        self.states = RowStates(self.rows.alive)
        """Empty for a model whose layers carry no state."""
        self.unread_slot = new(torch.int64, 1)
        """The slot of rows that are not alive."""
        self.types = new(torch.int64, count)
        """Token types: text."""
        self.segment_slots = new(torch.int32, room.segment_slots)
        self.segments = new(torch.int32, room.segments, SEGMENT_FIELDS)
        self.sampled = new(torch.int64, room.steps, count)
        """int64 [steps, R]; the tokens since the last reading."""
        self.logprobs = new(torch.float32, room.steps, count)
        """float32 [steps, R]; their natural-log probabilities."""
        self.steps = new(torch.int64, 1)
        """Steps since the last reading."""

    def fetch(self, steps: int) -> Results:
        """Copy the results of the `steps` since the last reading to the host, and count from 0 again. Waits for
        nothing: the memory of such copies is pinned."""

        def copied(tensor: Tensor) -> Tensor:
            return tensor.to("cpu", non_blocking=True, copy=True)

        tensors = self.sampled[:steps], self.logprobs[:steps], self.rows.count, self.rows.alive
        sampled, logprobs, count, alive = map(copied, tensors)
        self.steps.zero_()
        arrived = None
        if self.steps.is_cuda:
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
        return Results(sampled, logprobs, count, alive, arrived)

    def fill(self, name: str, values: np.ndarray) -> None:
        """Set the first rows of one of the `Rows` to `values`, whose other sizes may be smaller than there is room."""
        target: Tensor = getattr(self.rows, name)
        where: Any = tuple(slice(0, size) for size in values.shape)
        target[where].copy_(torch.from_numpy(values))

    def set_segments(self, table: np.ndarray) -> None:
        """Replace the table of shared parts."""
        self.segments.zero_()
        self.segments[: len(table)].copy_(torch.from_numpy(table))

    def empty_rows(self, start: int, end: int) -> None:
        """Make rows [start, end) rows that are not alive and attend to the unread slot alone."""
        rows = self.rows
        for each in (rows.token, rows.position, rows.count, rows.limit, rows.private, rows.depth, rows.shape):
            each[start:end] = 0
        for flag in (rows.alive, rows.is_greedy):
            flag[start:end] = False
        rows.stop_ids[start:end] = -1
        rows.temperature[start:end] = 1.0
        rows.own_length[start:end] = 1
        rows.slot[start:end] = self.unread_slot
        rows.own_slots[start:end, 0] = self.unread_slot.to(torch.int32)

    def keep(self, kept: np.ndarray) -> None:
        """Move the rows `kept`, int64 [n] ascending, to the front."""
        index = torch.from_numpy(kept).to(self.rows.token.device)
        for each in fields(self.rows):
            tensor: Tensor = getattr(self.rows, each.name)
            tensor[: len(kept)].copy_(tensor[index])
        self.states.keep(index)

    def tables(self, rows: int, levels: int, most_rows: int, most_keys: int) -> DecodeTables:
        """The tables of the first `rows` rows."""
        return DecodeTables(
            own_slots=self.rows.own_slots[:rows],
            own_length=self.rows.own_length[:rows],
            depth=self.rows.depth[:rows],
            segment_slots=self.segment_slots,
            segments=self.segments,
            levels=levels,
            most_rows=most_rows,
            most_keys=most_keys,
        )
