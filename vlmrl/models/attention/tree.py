"""Attention over a prefix tree: every query attends to its own ancestors and to nothing else.

The rows of a packed forward pass are the distinct tokens of many samples (trainer) or the new tokens of many requests
(embedded engine). Keys and values are addressed by slots: in the trainer a slot is a row, in the engine a place in its
KV cache. A `TreePlan` states which query attends to which key, in two kinds of blocks that together cover every
(query, ancestor) pair once:

    shared   a segment that many rows descend from, e.g. the system prompt: one dense block without a mask
             rows  [start, end)  ×  slots of the segment
    local    the rest of each segment's path, and the segment itself: padded batches with a causal mask
             rows  [B, n]        ×  slots [B, m]

Each block yields an output and a log-sum-exp. They merge exactly, as in flash attention (arXiv 2205.14135, eq. 3). The
backward pass recomputes the probabilities block by block from the merged log-sum-exp, so no quadratic array is kept.
The work is proportional to the distinct tokens. The gradient of a shared key is the sum over the branches that
attended to it.

On a GPU in half precision, the trainer's rows go through one kernel instead (fused.py).

Left out: dropout, sliding windows, soft caps. `vlmrl.models.policy` refuses a model that needs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmrl.errors import ModelError
from vlmrl.models.attention.fused import FusedPlan, Kernel, attend_fused, plan_flex, plan_varlen
from vlmrl.models.attention.prefix_tree import Segment
from vlmrl.models.features import to_device

ATTENTION_NAME = "vlmrl_tree"

MIN_SHARED_PAIRS = 16384
"""A segment becomes a shared block when (rows below it) × (its own tokens) reaches this. Below it, one more kernel
launch costs more than the padding that it saves."""

MAX_PAIRS = 1 << 30
"""Largest number of (query, key) pairs of one block, which keeps a byte and, for each head, a float32 of each pair.
With four heads, this many pairs need 17 GiB."""


@dataclass(frozen=True, eq=False)
class SharedBlock:
    """Rows [start, end) attend to all of `slots`."""

    start: int
    end: int
    slots: Tensor
    """int64 [m]."""


@dataclass(frozen=True, eq=False)
class LocalBlock:
    """A padded batch of B paths: query i of path b attends to slots[b, : offset[b] + i + 1]."""

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


@dataclass(eq=False)
class KVPool:
    """Keys and values of the embedded engine, per layer. The trainer has no pool: its rows are the slots."""

    keys: list[Tensor]
    """float [kv_heads, slots, head_dim] per layer."""
    values: list[Tensor]


@dataclass(eq=False)
class TreePlan:
    """Which rows attend to which slots in one forward pass."""

    shared: list[SharedBlock]
    local: list[LocalBlock]
    pool: KVPool | None = None
    first_slot: int = 0
    """The slot in the pool of the pass's first row: row r has slot `first_slot + r`."""
    fused: FusedPlan | None = None
    """The plan of a single kernel, used instead of the blocks; only for a pass without a pool."""


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


def local_blocks(
    paths: Sequence[np.ndarray], rows: Sequence[np.ndarray], offsets: Sequence[int], device: torch.device
) -> list[LocalBlock]:
    """Batch (path, rows) pairs of similar size. On path b, `offsets[b]` keys come before the first query's own key.

    Raises `ModelError` for sequences whose mask no memory holds.
    """
    buckets: dict[tuple[int, int], list[int]] = {}
    for index, (path, row) in enumerate(zip(paths, rows, strict=True)):
        # Powers of two bound the padding by half. Paths below 32 keys share one bucket.
        buckets.setdefault((len(row).bit_length(), max(len(path), 31).bit_length()), []).append(index)
    blocks = []
    for members in buckets.values():
        n = max(len(rows[i]) for i in members)
        m = max(len(paths[i]) for i in members)
        _refuse_pairs(len(members), n, m)
        padded_rows = np.empty((len(members), n), np.int64)
        padded_slots = np.empty((len(members), m), np.int64)
        for b, i in enumerate(members):
            padded_rows[b, : len(rows[i])] = rows[i]
            padded_rows[b, len(rows[i]) :] = rows[i][0]
            padded_slots[b, : len(paths[i])] = paths[i]
            padded_slots[b, len(paths[i]) :] = paths[i][0]
        lengths = np.array([len(rows[i]) for i in members])
        first = np.array([offsets[i] for i in members])
        is_valid = np.arange(n) < lengths[:, None]
        # A padding row attends to the keys of the row that it repeats: the backward pass subtracts that row's
        # log-sum-exp, and the score of a key that is not part of it may be 88 larger, whose exponential is infinite.
        mask = np.arange(m) <= (first[:, None] + np.where(is_valid, np.arange(n), 0))[:, :, None]
        valid = np.flatnonzero(is_valid)
        whole = len(valid) == padded_rows.size
        blocks.append(
            LocalBlock(
                rows=to_device(padded_rows, device),
                slots=to_device(padded_slots, device),
                mask=to_device(mask, device),
                valid=None if whole else to_device(valid, device),
                valid_rows=to_device(padded_rows.reshape(-1)[valid], device),
            )
        )
    return blocks


def _refuse_pairs(sequences: int, queries: int, keys: int) -> None:
    """Raise `ModelError` for a block that no memory holds."""
    if (pairs := sequences * queries * keys) > MAX_PAIRS:
        raise ModelError(
            f"attention of {sequences} × {queries:,} tokens to {keys:,} tokens would need a mask of "
            f"{pairs / 2**30:,.0f} GiB, and four times as much for each head, so this forward pass does not fit: lower "
            "trainer.seq_len, inference.max_model_len or trainer.micro_batch_tokens, or use a GPU with "
            "model.dtype=bfloat16, whose kernels need no mask."
        )


def plan_tree(segments: Sequence[Segment], device: torch.device) -> TreePlan:
    """The plan of one forward pass over `segments` (depth-first order; rows in the same order)."""
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
    for segment, rows_below, is_shared in zip(segments, below, shared, strict=True):
        if is_shared:
            _refuse_pairs(1, rows_below, len(segment.slots))

    tails: list[np.ndarray] = []
    paths, rows_of, offsets = [], [], []
    for segment, is_shared in zip(segments, shared, strict=True):
        # The tail is the part of the path that no shared block covers. A shared segment attends to itself causally.
        above = tails[segment.parent] if segment.parent >= 0 else np.empty(0, np.int64)
        assert not is_shared or len(above) == 0
        tails.append(above if is_shared else np.concatenate([above, segment.slots]))
        if len(segment.rows):
            paths.append(np.concatenate([above, segment.slots]))
            rows_of.append(segment.rows)
            offsets.append(len(above))
    return TreePlan(
        shared=[
            SharedBlock(end[i] - below[i], end[i], to_device(segments[i].slots, device))
            for i in range(len(segments))
            if shared[i]
        ],
        local=local_blocks(paths, rows_of, offsets, device),
    )


def make_plan(kernel: Kernel, segments: Sequence[Segment], device: torch.device) -> TreePlan:
    """The plan of a trainer's pass: its slots are its own rows."""
    match kernel:
        case Kernel.blocks:
            return plan_tree(segments, device)
        case Kernel.flex:
            return TreePlan(shared=[], local=[], fused=plan_flex(segments, device))
        case Kernel.varlen:
            return TreePlan(shared=[], local=[], fused=plan_varlen(segments, device))


def _merge(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """Merge one block's normalized output into the running output, in place."""
    merged = torch.logaddexp(lse, block_lse)
    out.mul_((lse - merged).exp_().unsqueeze(-1)).add_(block_out.mul_((block_lse - merged).exp_().unsqueeze(-1)))
    lse.copy_(merged)


class _TreeAttention(torch.autograd.Function):
    """q [H, T, D], k and v [KV, S, D] → [H, T, D]; heads of one key head stand next to each other (H = KV × G)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: TreePlan, scale: float) -> Tensor:
        kv_heads, _, dim = k.shape
        heads, length, _ = q.shape
        group = heads // kv_heads
        dtype = q.dtype
        # Compute in float32 also for half-precision inputs: rounded scores would cause most of the mismatch between
        # sampler and trainer.
        q = q.float() * scale
        out = torch.empty_like(q)
        lse = q.new_empty(heads, length, dtype=torch.float32)
        for local in plan.local:
            B, n = local.rows.shape
            scores, block_lse, total = _exponentiate(_local_scores(q, k, local, kv_heads, group))
            values = v.index_select(1, local.slots.reshape(-1)).float().view(kv_heads * B, -1, dim)
            block_out = torch.bmm(scores.view(kv_heads * B, group * n, -1), values)
            block_out.div_(total.view(kv_heads * B, group * n, 1))
            block_out = block_out.view(kv_heads, B, group, n, dim).transpose(1, 2).reshape(heads, B * n, dim)
            flat_lse = block_lse.view(kv_heads, B, group, n).transpose(1, 2).reshape(heads, B * n)
            if local.valid is not None:
                block_out, flat_lse = block_out[:, local.valid], flat_lse[:, local.valid]
            out[:, local.valid_rows] = block_out
            lse[:, local.valid_rows] = flat_lse
        for shared in plan.shared:
            scores, block_lse, total = _exponentiate(_shared_scores(q, k, shared, kv_heads))
            block_out = torch.bmm(scores, v[:, shared.slots].float()).div_(total.unsqueeze(-1))
            rows = shared.end - shared.start
            _merge(
                out[:, shared.start : shared.end],
                lse[:, shared.start : shared.end],
                block_out.view(heads, rows, dim),
                block_lse.view(heads, rows),
            )
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan, ctx.scale = plan, scale
        return out.to(dtype)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, out, lse = ctx.saved_tensors
        plan, scale = ctx.plan, ctx.scale
        kv_heads, _, dim = k.shape
        heads = q.shape[0]
        group = heads // kv_heads
        grad_q, grad_k, grad_v = (torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v))
        dtype, grad_out = grad_out.dtype, grad_out.float().contiguous()
        delta = (grad_out * out).sum(-1)
        """float32 [H, T]; the term of the score gradient that comes from the softmax's normalization."""
        for local in plan.local:
            B, n = local.rows.shape
            flat_rows, flat_slots = local.rows.reshape(-1), local.slots.reshape(-1)

            def rowwise(x: Tensor, B: int = B, n: int = n, flat_rows: Tensor = flat_rows) -> Tensor:
                """[H, T, …] → [KV × B, G × n, …], one row per local query."""
                tail = x.shape[2:]
                x = x.index_select(1, flat_rows).view(kv_heads, group, B, n, *tail)
                return x.transpose(1, 2).reshape(kv_heads * B, group * n, *tail)

            probs = _local_scores(q, k, local, kv_heads, group).view(kv_heads * B, group * n, -1)
            probs.sub_(rowwise(lse).unsqueeze(-1)).exp_()
            if local.valid is not None:
                live = torch.zeros(B * n, dtype=probs.dtype, device=probs.device)
                live[local.valid] = 1.0
                probs.view(kv_heads, B, group, n, -1).mul_(live.view(B, 1, n, 1))
            row_grad = rowwise(grad_out)
            keys = k.index_select(1, flat_slots).float().view(kv_heads * B, -1, dim)
            values = v.index_select(1, flat_slots).float().view(kv_heads * B, -1, dim)
            grad_values = torch.bmm(probs.transpose(1, 2), row_grad)
            grad_scores = torch.bmm(row_grad, values.transpose(1, 2))
            grad_scores.sub_(rowwise(delta).unsqueeze(-1)).mul_(probs)
            grad_rows = torch.bmm(grad_scores, keys).view(kv_heads, B, group, n, dim).transpose(1, 2)
            grad_q.index_add_(1, flat_rows, grad_rows.reshape(heads, B * n, dim))
            grad_keys = torch.bmm(grad_scores.transpose(1, 2), rowwise(q))
            grad_k.index_add_(1, flat_slots, grad_keys.view(kv_heads, -1, dim))
            grad_v.index_add_(1, flat_slots, grad_values.view(kv_heads, -1, dim))
        for shared in plan.shared:
            rows = slice(shared.start, shared.end)

            def fold(x: Tensor, rows: slice = rows) -> Tensor:
                """[H, T, …] → [KV, G × rows, …]."""
                return x[:, rows].reshape(kv_heads, -1, *x.shape[2:])

            probs = _shared_scores(q, k, shared, kv_heads)
            probs.sub_(fold(lse).unsqueeze(-1)).exp_()
            row_grad = fold(grad_out)
            grad_v.index_add_(1, shared.slots, torch.bmm(probs.transpose(1, 2), row_grad))
            grad_scores = torch.bmm(row_grad, v[:, shared.slots].float().transpose(1, 2))
            grad_scores.sub_(fold(delta).unsqueeze(-1)).mul_(probs)
            grad_q[:, rows] += torch.bmm(grad_scores, k[:, shared.slots].float()).view(heads, -1, dim)
            grad_k.index_add_(1, shared.slots, torch.bmm(grad_scores.transpose(1, 2), fold(q)))
        return grad_q.mul_(scale).to(dtype), grad_k.to(dtype), grad_v.to(dtype), None, None


def _exponentiate(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[…, m] → exp(scores − their maximum), in place; log-sum-exp […]; sum of the exponentials […].

    The caller divides its output by the sum, which is cheaper than dividing the scores: the output is narrower.
    """
    largest = scores.amax(-1)
    scores.sub_(largest.unsqueeze(-1)).exp_()
    total = scores.sum(-1)
    return scores, largest + total.log(), total


def _local_scores(q: Tensor, k: Tensor, block: LocalBlock, kv_heads: int, group: int) -> Tensor:
    """float32 [KV, B, G × n, m]; −inf where the query does not attend to the key. `q` is scaled already."""
    B, n = block.rows.shape
    dim = q.shape[-1]
    queries = q.index_select(1, block.rows.reshape(-1)).view(kv_heads, group, B, n, dim).transpose(1, 2)
    keys = k.index_select(1, block.slots.reshape(-1)).float().view(kv_heads * B, -1, dim)
    scores = torch.bmm(queries.reshape(kv_heads * B, group * n, dim), keys.transpose(1, 2))
    scores.view(kv_heads, B, group, n, -1).masked_fill_(~block.mask[:, None], float("-inf"))
    return scores.view(kv_heads, B, group * n, -1)


def _shared_scores(q: Tensor, k: Tensor, block: SharedBlock, kv_heads: int) -> Tensor:
    """float32 [KV, G × rows, m]. `q` is scaled already."""
    queries = q[:, block.start : block.end].reshape(kv_heads, -1, q.shape[-1])
    return torch.bmm(queries, k[:, block.slots].float().transpose(1, 2))


def tree_attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    *,
    tree_plan: TreePlan,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, H, T, D], key and value [1, KV, T, D] → [1, T, H, D]."""
    assert attention_mask is None, "the tree plan replaces the mask"
    assert dropout == 0.0, "attention dropout is not supported"
    if tree_plan.fused is not None:
        return attend_fused(query, key, value, tree_plan.fused, scaling), None
    q, k, v = query[0].contiguous(), key[0].contiguous(), value[0].contiguous()
    if tree_plan.pool is not None:
        layer = module.layer_idx
        assert isinstance(layer, int)
        pool_k, pool_v = tree_plan.pool.keys[layer], tree_plan.pool.values[layer]
        new = slice(tree_plan.first_slot, tree_plan.first_slot + k.shape[1])
        pool_k[:, new] = k
        pool_v[:, new] = v
        k, v = pool_k, pool_v
    with torch.autocast(q.device.type, enabled=False):
        out = _TreeAttention.apply(q, k, v, tree_plan, scaling)  # type: ignore[no-untyped-call]
    return out.transpose(0, 1).unsqueeze(0), None
