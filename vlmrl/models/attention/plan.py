"""Which rows of a forward pass attend to which keys, as blocks for the kernels of tree.py.

The rows of a pass are the distinct tokens of many samples (trainer) or the new tokens of many requests (embedded
engine). Keys and values are addressed by slots: in the trainer a slot is a row, in the engine a place in its KV cache.
Two kinds of blocks together cover every (query, visible key) pair once:

    shared   a segment that many rows descend from, e.g. the system prompt: one dense block
             rows  [start, end)  ×  slots of the segment
    local    the rest of each segment's path, and the segment itself: padded batches with a mask
             rows  [B, n]        ×  slots [B, m]

A plan has blocks for every rule (rules.py) that the model's layers follow, so one plan serves all layers. Distances are
depths: the number of tokens before a token on its own branch. A window cuts paths and shared segments to the keys that
some row sees; only where rows at different depths see different keys of a shared segment, its block gets a mask. Where
no branch is longer than the window, the windowed layers use the blocks of the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from vlmrl.errors import ModelError
from vlmrl.models.attention.decode import DecodeRows
from vlmrl.models.attention.fused import (
    SHORT_PASS_ROWS,
    FusedPlan,
    Kernel,
    Paths,
    plan_flex,
    plan_paths,
    plan_varlen,
)
from vlmrl.models.attention.prefix_tree import Segment, depths
from vlmrl.models.attention.recurrent import StatePlan
from vlmrl.models.attention.row_states import RowStates
from vlmrl.models.attention.rules import CAUSAL, AttentionRule, AttentionRules
from vlmrl.models.features import to_device
from vlmrl.types import IntArray

MIN_SHARED_PAIRS = 16384
"""A segment becomes a shared block when (rows below it) × (its own tokens) reaches this. Below it, one more kernel
launch costs more than the padding that it saves."""

MAX_PAIRS = 1 << 30
"""Largest number of (query, key) pairs of one block, which keeps a byte and, for each head, a float32 of each pair.
With four heads, this many pairs need 17 GiB."""

MIN_WINDOWED_ROWS = 128
"""A segment longer than this and than its window is cut into local blocks of the longer of the two."""


@dataclass(frozen=True, eq=False)
class SharedBlock:
    """Rows [start, end) attend to all of `slots`, or to those that `mask` shows."""

    start: int
    end: int
    slots: Tensor
    """int64 [m]."""
    mask: Tensor | None = None
    """bool [end − start, m]; True where the row attends to the key. A row may see none of them."""


@dataclass(frozen=True, eq=False)
class LocalBlock:
    """A padded batch of B paths, masked."""

    rows: Tensor
    """int64 [B, n]; padding repeats the path's first row."""
    slots: Tensor
    """int64 [B, m]; padding repeats a valid slot and is masked."""
    mask: Tensor
    """bool [B, n, m]; True where the query attends to the key. A padding row has the mask of the row it repeats."""
    valid: Tensor | None
    """int64 [v]; flat indices into [B × n] of the rows that are not padding; None where nothing is padded."""
    valid_rows: Tensor
    """int64 [v]; the rows of `valid`."""


@dataclass(frozen=True, eq=False)
class Blocks:
    """The blocks of one rule."""

    shared: list[SharedBlock]
    local: list[LocalBlock]


LayerPlan: TypeAlias = Blocks | FusedPlan | Paths | DecodeRows
"""What one layer needs of the plan of a pass."""


class KVPool:
    """Keys and values of the embedded engine, per call of attention in a pass, `capacity` slots each. The trainer has
    no pool: its rows are the slots.

    Calls are counted, not layers: DiffLlama's layers call attention twice, and HRM runs its layers several times. A
    call's tensors get their shape and dtype from the first keys and values that it writes, because layers of one model
    may differ (Gemma 4 has two head sizes)."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.calls: dict[int, tuple[Tensor, Tensor]] = {}
        """Number of the call in its pass → keys and values, float [kv_heads, capacity, head size] each."""

    def write(self, call: int, first_slot: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write key and value [kv_heads, n, head size] to the n slots from `first_slot` on → all of the call's."""
        if call not in self.calls:
            self.calls[call] = self._empty(key), self._empty(value)
        for kept, new in zip(self.calls[call], (key, value), strict=True):
            kept[:, first_slot : first_slot + new.shape[1]] = new
        return self.calls[call]

    def grown(self, capacity: int, used: int) -> KVPool:
        """A pool of `capacity` slots with the content of the first `used` slots of this one."""
        pool = KVPool(capacity)
        for call, (key, value) in self.calls.items():
            pool.write(call, 0, key[:, :used], value[:, :used])
        return pool

    def _empty(self, like: Tensor) -> Tensor:
        return like.new_empty(like.shape[0], self.capacity, like.shape[2])


@dataclass(eq=False)
class TreePlan:
    """Which rows attend to which slots in one forward pass."""

    rules: AttentionRules
    """The rules that the pass was planned for."""
    by_window: dict[int | None, LayerPlan]
    """The window of a rule → its blocks, or the plan of a single kernel for a pass without a pool, or of a decode
    step."""
    pool: KVPool | None = None
    first_slot: int = 0
    """The slot in the pool of the pass's first row: row r has slot `first_slot + r`."""
    row_slots: Tensor | None = None
    """int64 [T]; the slot in the pool of each row of a decode step, which do not follow each other; else None."""
    segments: Sequence[Segment] = ()
    """The segments of a trainer's pass, for layers that carry a state."""
    states: StatePlan | None = None
    """The order in which layers that carry a state compute the rows; made from `segments` where it is missing."""
    row_states: RowStates | None = None
    """The states of the rows of a decode step, in place of `states`; None for a model without states."""
    calls: int = 0
    """Calls of attention so far, in a pass with a pool."""

    def write(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write the keys and values of the next call into the pool → all that the call has there."""
        assert self.pool is not None
        self.calls += 1
        return self.pool.write(self.calls - 1, self.first_slot, key, value)

    def next_pool(self) -> tuple[Tensor, Tensor]:
        """Keys and values that the pool has of the next call, which has written some before."""
        assert self.pool is not None
        self.calls += 1
        return self.pool.calls[self.calls - 1]


def shared_segments(parents: Sequence[int], lengths: Sequence[int], queries: Sequence[int]) -> list[bool]:
    """Which segments become shared blocks: a chain from the root whose blocks are dense enough.

    `queries[i]` counts the query rows strictly below segment i. A segment may be shared only if it is a root or its
    parent is shared, so that the part of a path that is not shared is its tail.

    >>> shared_segments([-1, 0, 1, 1], [100, 2000, 5, 5], [10_000, 100, 0, 0])
    [True, True, False, False]
    """
    shared: list[bool] = []
    for parent, length, below in zip(parents, lengths, queries, strict=True):
        shared.append((parent < 0 or shared[parent]) and below * length >= MIN_SHARED_PAIRS)
    return shared


def shared_blocks(
    start: int, slots: IntArray, first_depth: int, row_depths: IntArray, window: int | None, device: torch.device
) -> list[SharedBlock]:
    """The block of the rows from `start` on, whose depths are `row_depths`, and a segment above all of them; none where
    no row sees a key. The segment's first key has the depth `first_depth`."""
    mask = None
    if window is not None:
        hidden = max(0, int(row_depths.min()) - window + 1 - first_depth)
        slots, first_depth = slots[hidden:], first_depth + hidden
        if not len(slots):
            return []
        if int(row_depths.max()) - first_depth >= window:
            _refuse_pairs(1, len(row_depths), len(slots))
            key_depths = first_depth + np.arange(len(slots))
            mask = to_device(row_depths[:, None] - key_depths < window, device)
    _refuse_pairs(1, len(row_depths), len(slots))
    return [SharedBlock(start, start + len(row_depths), to_device(slots, device), mask)]


@dataclass(frozen=True, eq=False)
class Path:
    """The keys and queries of one row of a local block."""

    slots: IntArray
    """int64 [m]; the slots of neighboring tokens of one branch."""
    rows: IntArray
    """int64 [n]; the query rows, neighboring too."""
    first: int
    """Index in `slots` of the first query's own key."""
    last: IntArray | None = None
    """int64 [n]; for each query the index in `slots` of the last key that it sees; None where that is its own."""


def local_blocks(paths: Sequence[Path], window: int | None, device: torch.device) -> list[LocalBlock]:
    """Batch paths of similar size.

    Raises `ModelError` for sequences whose mask no memory holds.
    """
    buckets: dict[tuple[int, int], list[Path]] = {}
    for path in paths:
        # Powers of two bound the padding by half. Paths below 32 keys share one bucket.
        buckets.setdefault((len(path.rows).bit_length(), max(len(path.slots), 31).bit_length()), []).append(path)
    return [_local_block(members, window, device) for members in buckets.values()]


def _local_block(paths: Sequence[Path], window: int | None, device: torch.device) -> LocalBlock:
    n = max(len(path.rows) for path in paths)
    m = max(len(path.slots) for path in paths)
    _refuse_pairs(len(paths), n, m)
    rows = np.empty((len(paths), n), np.int64)
    slots = np.empty((len(paths), m), np.int64)
    for b, path in enumerate(paths):
        rows[b, : len(path.rows)], rows[b, len(path.rows) :] = path.rows, path.rows[0]
        slots[b, : len(path.slots)], slots[b, len(path.slots) :] = path.slots, path.slots[0]
    is_valid = np.arange(n) < np.array([len(path.rows) for path in paths])[:, None]
    # A padding row attends to the keys of the row that it repeats: the backward pass subtracts that row's log-sum-exp,
    # and the score of a key that is not part of it may be 88 larger, whose exponential is infinite.
    own = np.array([path.first for path in paths])[:, None] + np.where(is_valid, np.arange(n), 0)
    last = own.copy()
    for b, path in enumerate(paths):
        if path.last is not None:
            last[b, : len(path.rows)], last[b, len(path.rows) :] = path.last, path.last[0]
    mask = np.arange(m) <= last[:, :, None]
    if window is not None:
        mask &= np.arange(m) > own[:, :, None] - window
    valid = np.flatnonzero(is_valid)
    return LocalBlock(
        rows=to_device(rows, device),
        slots=to_device(slots, device),
        mask=to_device(mask, device),
        valid=None if len(valid) == rows.size else to_device(valid, device),
        valid_rows=to_device(rows.reshape(-1)[valid], device),
    )


def _refuse_pairs(sequences: int, queries: int, keys: int) -> None:
    """Raise `ModelError` for a block that no memory holds."""
    if (pairs := sequences * queries * keys) > MAX_PAIRS:
        raise ModelError(
            f"attention of {sequences} × {queries:,} tokens to {keys:,} tokens would need a mask of "
            f"{pairs / 2**30:,.0f} GiB, and four times as much for each head, so this forward pass does not fit: lower "
            "trainer.seq_len, inference.max_model_len or trainer.micro_batch_tokens, or use a GPU with "
            "model.dtype=bfloat16, whose kernels need no mask."
        )


def plan_tree(segments: Sequence[Segment], device: torch.device, rules: AttentionRules = CAUSAL) -> TreePlan:
    """The plan of one forward pass over `segments` (depth-first order; rows in the same order)."""
    deepest = max(depth + len(segment.slots) for depth, segment in zip(depths(segments), segments, strict=True))
    planned: dict[AttentionRule, Blocks] = {}
    by_window: dict[int | None, LayerPlan] = {}
    for rule in rules.distinct:
        effective = replace(rule, window=None) if rule.window is not None and deepest <= rule.window else rule
        if effective not in planned:
            planned[effective] = _plan_rule(segments, effective, device)
        by_window[rule.window] = planned[effective]
    return TreePlan(rules, by_window, segments=segments)


def _plan_rule(segments: Sequence[Segment], rule: AttentionRule, device: torch.device) -> Blocks:
    starts = depths(segments)
    parents = [s.parent for s in segments]
    below = [0] * len(segments)
    end = [0] * len(segments)
    """Depth-first order makes the rows below a segment contiguous: [end − below, end)."""
    for i in reversed(range(len(segments))):
        rows, parent = segments[i].rows, parents[i]
        if parent >= 0:
            below[parent] += below[i] + len(rows)
            end[parent] = max(end[parent], end[i], int(rows[-1]) + 1 if len(rows) else 0)
    shared = shared_segments(parents, [len(s.slots) for s in segments], below)
    row_depths = np.concatenate([start + np.arange(len(s.rows)) for start, s in zip(starts, segments, strict=True)])
    blocks: list[SharedBlock] = []
    tails: list[IntArray] = []
    paths: list[Path] = []
    for i, segment in enumerate(segments):
        if shared[i]:
            first = end[i] - below[i]
            blocks += shared_blocks(first, segment.slots, starts[i], row_depths[first : end[i]], rule.window, device)
        # The tail is the part of the path that no shared block covers. A shared segment attends to itself locally.
        above = tails[segment.parent] if segment.parent >= 0 else np.empty(0, np.int64)
        assert not shared[i] or len(above) == 0
        path = np.concatenate([above, segment.slots])
        tails.append(above if shared[i] else path)
        if len(segment.rows):
            paths += _paths(segment, path, rule)
    return Blocks(blocks, local_blocks(paths, rule.window, device))


def _paths(segment: Segment, path: IntArray, rule: AttentionRule) -> list[Path]:
    """The rows of `segment` with the keys of `path` that they see; with a window in pieces, so that the work is
    proportional to the window. `path` ends with the segment."""
    first = len(path) - len(segment.rows)
    if rule.window is None and not rule.image_runs:
        return [Path(path, segment.rows, first)]
    last = first + segment.last_seen(rule.image_runs)
    if rule.window is None:
        return [Path(path, segment.rows, first, last)]
    size = max(rule.window, MIN_WINDOWED_ROWS)
    pieces = []
    for start in range(0, len(segment.rows), size):
        rows, until = segment.rows[start : start + size], last[start : start + size]
        oldest = max(0, first + start - rule.window + 1)
        pieces.append(Path(path[oldest : until.max() + 1], rows, first + start - oldest, until - oldest))
    return pieces


def make_plan(
    kernel: Kernel, segments: Sequence[Segment], device: torch.device, rules: AttentionRules = CAUSAL
) -> TreePlan:
    """The plan of a trainer's pass: its slots are its own rows. A short pass is planned for blocks in place of
    FlexAttention."""
    is_short = sum(len(segment.rows) for segment in segments) <= SHORT_PASS_ROWS
    if kernel is Kernel.blocks or (kernel is Kernel.flex and is_short):
        return plan_tree(segments, device, rules)
    plan = partial(plan_flex if kernel is Kernel.flex else plan_varlen, segments, device)
    return TreePlan(rules, {rule.window: plan(rule) for rule in rules.distinct}, segments=segments)


def plan_prefill(
    segments: Sequence[Segment], device: torch.device, kernel: Kernel, rules: AttentionRules = CAUSAL
) -> TreePlan:
    """The plan of a pass of the embedded engine, whose rows also see keys that are in the pool already. `kernel` is the
    one for separate sequences; FlexAttention has the rows alone for keys, so blocks take its place."""
    paths = plan_paths(segments, device) if kernel is Kernel.varlen else None
    if paths is None:
        return plan_tree(segments, device, rules)
    assert not rules.image_runs, "flash attention cannot express attention among the tokens of an image"
    return TreePlan(
        rules, {rule.window: replace(paths, window=rule.window) for rule in rules.distinct}, segments=segments
    )
