"""Attention of decode steps in two parts: one new token per row, whose siblings read the prompt that they share once.

    row     its keys                                     read
    a1      [system prompt][problem a][own tokens]       segments   once for all rows below them, as dense products
    a2      [system prompt][problem a][own tokens]       own        by each row for itself
    b1      [system prompt][problem b][own tokens]

Each part yields an output and a log-sum-exp. They merge exactly, as in flash attention (arXiv 2205.14135, eq. 3); the
split into a shared and an own part is that of Hydragen (arXiv 2402.05099). A row lies below at most one segment of each
level of the tree.

All tables are tensors of fixed sizes that are filled anew where rows leave, so a step can be captured as a CUDA graph:
neither sizes nor addresses change from step to step. On a GPU with Triton the kernels of decode_kernels.py compute,
elsewhere torch does, with the same parts.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from functools import cache
from typing import TypeAlias

import torch
from torch import Tensor

SEGMENT_FIELDS = 6
"""Columns of `DecodeTables.segments`."""

SPLITS = 2
"""Parts that a segment's keys are split into, so that few segments occupy all of a GPU."""


@dataclass(frozen=True, eq=False)
class DecodeTables:
    """Which slots of the KV cache each of R rows attends to. The newest token of a row is the last of its own part."""

    own_slots: Tensor
    """int32 [R, C]; the slots of a row's own part; anything from `own_length` on, but inside the pool."""
    own_length: Tensor
    """int32 [R]; at least 1."""
    depth: Tensor
    """int32 [R]; tokens before the row's newest token."""
    segment_slots: Tensor
    """int32 [S]; the slots of all segments, one after the other."""
    segments: Tensor
    """int32 [I, 6]; per segment: first row, end of its rows, index of its first slot in `segment_slots`, number of
    slots, depth of the first slot, level. A segment without rows is ignored."""
    levels: int
    """Levels of the segments; 0 where nothing is shared."""
    most_rows: int
    """No segment has more rows."""
    most_keys: int
    """No segment has more slots. The kernels do not read it."""

    def first(self, rows: int) -> DecodeTables:
        """The tables of the first `rows` rows, which share the memory of these."""
        return replace(
            self,
            own_slots=self.own_slots[:rows],
            own_length=self.own_length[:rows],
            depth=self.depth[:rows],
        )


@dataclass(frozen=True, eq=False)
class DecodeRows:
    """The plan of a decode step, for the layers of one window."""

    tables: DecodeTables
    window: int | None
    """See `AttentionRule.window`."""


KeysAndValues: TypeAlias = tuple[Tensor, Tensor]


def attend_decode(
    query: Tensor,
    new: KeysAndValues,
    pool: KeysAndValues,
    slots: Tensor,
    plan: DecodeRows,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """Write the `new` key and value of R rows, [KV, R, D] and [KV, R, E], to `slots` of the pool, int64 [R], which are
    the last slots of the rows' own parts; then attention of query [H, R, D] to keys [KV, slots, D] and values
    [KV, slots, E] of the pool → [R, H, E].

    With `softcap` c a score s becomes c · tanh(s / c). Computed in float32 also for half precision.
    """
    if uses_kernels(query.device):
        from vlmrl.models.attention.decode_kernels import attend_by_kernels

        return attend_by_kernels(query, new, pool, slots, plan, scale, softcap)
    for kept, written in zip(pool, new, strict=True):
        kept.index_copy_(1, slots, written)
    return attend_by_torch(query, *pool, plan, scale, softcap)


def uses_kernels(device: torch.device) -> bool:
    """Whether the kernels compute, and not torch. Triton comes with torch for CUDA on Linux."""
    return device.type == "cuda" and _has_triton()


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def attend_by_torch(
    query: Tensor, key: Tensor, value: Tensor, plan: DecodeRows, scale: float, softcap: float | None = None
) -> Tensor:
    """`attend_decode` on any device, once the new keys and values are written: key [KV, slots, D], value [KV, slots,
    E]. No size depends on the contents of a tensor."""
    heads, rows, dim = query.shape
    kv_heads = key.shape[0]
    wide = torch.promote_types(query.dtype, torch.float32)
    # [KV, G, R, D]; heads of one key head stand next to each other
    q = (query.to(wide) * scale).view(kv_heads, heads // kv_heads, rows, dim)
    out, lse = _own_part(q, key, value, plan, softcap)
    if plan.tables.levels:
        part_out, part_lse = _segment_parts(q, key, value, plan, softcap)
        lses = torch.cat([lse[None], part_lse])
        weights = torch.softmax(lses, 0)
        out = (torch.cat([out[None], part_out]) * weights[..., None]).sum(0)
    return out.reshape(rows, heads, -1).to(query.dtype)


def _own_part(q: Tensor, key: Tensor, value: Tensor, plan: DecodeRows, softcap: float | None) -> tuple[Tensor, Tensor]:
    """→ [R, KV, G, E] and [R, KV, G]."""
    tables = plan.tables
    number = torch.arange(tables.own_slots.shape[1], device=q.device)
    length = tables.own_length[:, None]
    shown = number < length
    if plan.window is not None:
        shown &= number >= length - plan.window
    keys, values = (x[:, tables.own_slots].to(q.dtype) for x in (key, value))
    scores = torch.einsum("kgrd,krnd->rkgn", q, keys)
    weights, lse = _exponentiate(scores, shown[:, None, None], softcap)
    values = values.masked_fill(~shown[:, :, None], 0.0)  # what no row has written may be NaN
    return torch.einsum("rkgn,krne->rkge", weights, values), lse


def _segment_parts(
    q: Tensor, key: Tensor, value: Tensor, plan: DecodeRows, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """→ [levels, R, KV, G, E], and [levels, R, KV, G], −inf where a row is below no segment of the level."""
    tables = plan.tables
    kv_heads, group, rows, _ = q.shape
    first, end, offset, length, depth, level = tables.segments.long().unbind(1)
    row = first[:, None] + torch.arange(tables.most_rows, device=q.device)
    is_row = row < end[:, None]
    number = torch.arange(tables.most_keys, device=q.device)
    is_key = number < length[:, None]
    slots = tables.segment_slots[((offset[:, None] + number) * is_key)]
    known = row.clamp(max=rows - 1)
    shown = (is_row[:, :, None] & is_key[:, None])[:, None, None]
    if plan.window is not None:
        near = tables.depth[known][:, :, None] - (depth[:, None] + number)[:, None] < plan.window
        shown = shown & near[:, None, None]
    scores = torch.einsum("kgimd,kind->ikgmn", q[:, :, known], key[:, slots].to(q.dtype))
    weights, lse = _exponentiate(scores, shown, softcap)
    found = torch.einsum("ikgmn,kine->imkge", weights, value[:, slots].to(q.dtype))
    # Row `rows` takes what belongs to no row.
    place = level[:, None].expand_as(row), torch.where(is_row, row, rows)
    out = found.new_zeros(tables.levels, rows + 1, kv_heads, group, found.shape[-1])
    out_lse = found.new_full((tables.levels, rows + 1, kv_heads, group), float("-inf"))
    out.index_put_(place, found)
    out_lse.index_put_(place, lse.permute(0, 3, 1, 2))
    return out[:, :rows], out_lse[:, :rows]


def _exponentiate(scores: Tensor, shown: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Scores […, n] → probabilities among the keys that are `shown`, all 0 where none is, and log-sum-exp […]."""
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~shown, float("-inf"))
    lse = scores.logsumexp(-1)
    return (scores - lse.clamp(min=torch.finfo(scores.dtype).min)[..., None]).exp(), lse
