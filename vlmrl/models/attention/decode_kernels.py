"""The Triton kernels of decode.py. They need a GPU, or Triton's interpreter (`TRITON_INTERPRET=1`).

Both loop over their keys as flash attention does, with scores and sums in float32. Slots are looked up in a table; a
key is contiguous, so each look-up is followed by a read of `head size` numbers in a row.
"""
# Triton's language has no types, and Triton is not installed where mypy runs.
# mypy: disable-error-code="import-not-found,untyped-decorator,no-untyped-def"

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmrl.models.attention.decode import SPLITS, DecodeRows, KeysAndValues

LEAST_ROWS = 16
"""The least rows of a product on tensor cores."""


@dataclass(frozen=True)
class Launch:
    """How a kernel is launched; measured on an H200 with heads of 128 numbers (benchmarks/embedded_gpu.md)."""

    tile: int
    """Numbers of a tile of keys: 8192 are 64 keys of size 128."""
    warps: int
    stages: int
    """Tiles that are loaded ahead, plus one."""
    output: int
    """Numbers of the output of so many warps. A larger one is shared among more, whose registers have to hold it."""

    def options(self, entries: int, size: int) -> dict[str, int]:
        """For `entries` queries and heads of `size` numbers, powers of two.

        >>> SEGMENT.options(128, 128)
        {'M': 128, 'N': 64, 'num_warps': 8, 'num_stages': 3}
        """
        keys, warps = max(16, min(128, self.tile // size)), self.warps * max(1, entries * size // self.output)
        return {"M": entries, "N": keys, "num_warps": min(8, warps), "num_stages": self.stages}


SEGMENT = Launch(8192, 2, 3, output=32 * 128)
OWN = Launch(4096, 1, 4, output=16 * 128)

LOG2_E = tl.constexpr(math.log2(math.e))


def attend_by_kernels(
    query: Tensor,
    new: KeysAndValues,
    pool: KeysAndValues,
    slots: Tensor,
    plan: DecodeRows,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """See `attend_decode`."""
    tables, (key, value) = plan.tables, pool
    query, new_key, new_value = (x if x.stride(2) == 1 else x.contiguous() for x in (query, *new))
    heads, rows, dim = query.shape
    kv_heads, dim_out = key.shape[0], value.shape[-1]
    group = heads // kv_heads
    padded, padded_out = triton.next_power_of_2(dim), triton.next_power_of_2(dim_out)
    parts = tables.levels * SPLITS
    part_out = torch.empty(max(1, parts), rows, heads, dim_out, device=query.device)
    part_lse = torch.full((max(1, parts), rows, heads), float("-inf"), device=query.device)
    common = (
        scale, softcap or 0.0, plan.window or 0, rows, query.stride(1), query.stride(0), key.stride(0), value.stride(0),
    )  # fmt: skip
    shape = {
        "H": heads, "K": kv_heads, "D": dim, "E": dim_out, "DP": max(16, padded), "EP": max(16, padded_out),
        "CAPPED": softcap is not None, "WINDOWED": plan.window is not None,
    }  # fmt: skip
    size = max(16, padded, padded_out)
    if parts:
        entries = tables.most_rows * group
        block = max(LEAST_ROWS, min(128 if padded <= 128 else 32, triton.next_power_of_2(entries)))
        _segment_part[(len(tables.segments) * kv_heads, SPLITS, triton.cdiv(entries, block))](
            query, key, value, tables.segments, tables.segment_slots, tables.depth, part_out, part_lse,
            *common, SPLITS, **shape, **SEGMENT.options(block, size),
        )  # fmt: skip
    out = torch.empty(rows, heads, dim_out, device=query.device, dtype=query.dtype)
    block = max(LEAST_ROWS, triton.next_power_of_2(group))
    _own_part[(rows, kv_heads)](
        query, key, value, tables.own_slots, tables.own_length, part_out, part_lse, out, new_key, new_value, slots,
        *common, new_key.stride(1), new_key.stride(0), new_value.stride(1), new_value.stride(0),
        tables.own_slots.stride(0), parts, **shape, **OWN.options(block, size),
    )  # fmt: skip
    return out


@triton.jit
def _add_tile(
    q, keys, values, k_base, v_base, slots, here, shown, largest, total, sums, scale, cap,
    D: tl.constexpr, E: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Add N keys to the running maximum (to the base 2), sum and output of M entries. `here` [N]: whether the key is
    there; `shown` [M, N]: whether the entry attends to it."""
    d, e = tl.arange(0, DP), tl.arange(0, EP)
    at = slots.to(tl.int64)
    k = tl.load(keys + k_base + at[None, :] * D + d[:, None], mask=here[None, :] & (d < D)[:, None], other=0.0)
    scores = tl.dot(q, k, out_dtype=tl.float32, input_precision="ieee") * scale
    if CAPPED:
        scores = cap * (2.0 * tl.sigmoid(2.0 * scores / cap) - 1.0)  # tanh
    scores = tl.where(shown, scores * LOG2_E, float("-inf"))
    new = tl.maximum(largest, tl.max(scores, 1))
    safe = tl.where(new == float("-inf"), 0.0, new)  # an entry that sees no key yet
    weights = tl.exp2(scores - safe[:, None])
    shrunk = tl.exp2(largest - safe)
    v = tl.load(values + v_base + at[:, None] * E + e[None, :], mask=here[:, None] & (e < E)[None, :], other=0.0)
    sums = sums * shrunk[:, None] + tl.dot(weights.to(v.dtype), v, out_dtype=tl.float32, input_precision="ieee")
    return new, total * shrunk + tl.sum(weights, 1), sums


@triton.jit
def _segment_part(
    query, keys, values, segments, segment_slots, depths, part_out, part_lse,
    scale, cap, window, rows, q_row, q_head, k_head, v_head, splits,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, E: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """The rows below one segment against a part of its keys, for one key head."""
    G: tl.constexpr = H // K
    field = segments + tl.program_id(0) // K * 6
    head, split = tl.program_id(0) % K, tl.program_id(1)
    first_row, end_row = tl.load(field), tl.load(field + 1)
    offset, length = tl.load(field + 2), tl.load(field + 3)
    first_depth, level = tl.load(field + 4), tl.load(field + 5)
    entry = tl.program_id(2) * M + tl.arange(0, M)
    row, own_head = first_row + entry // G, head * G + entry % G
    inside = row < end_row
    if tl.program_id(2) * M < (end_row - first_row) * G:
        d, e = tl.arange(0, DP), tl.arange(0, EP)
        q = tl.load(
            query + row[:, None] * q_row + own_head[:, None] * q_head + d[None, :],
            mask=inside[:, None] & (d < D)[None, :], other=0.0,
        )  # fmt: skip
        depth = tl.load(depths + row, mask=inside, other=0)
        part = tl.cdiv(tl.cdiv(length, splits), N) * N
        start, end = split * part, tl.minimum(split * part + part, length)
        if WINDOWED:  # keys that no row sees are not read
            oldest = tl.min(tl.where(inside, depth, 2147483647), 0) - window + 1 - first_depth
            start = tl.maximum(start, oldest // N * N)
        k_base, v_base = head.to(tl.int64) * k_head, head.to(tl.int64) * v_head
        largest = tl.full([M], float("-inf"), tl.float32)
        total = tl.zeros([M], tl.float32)
        sums = tl.zeros([M, EP], tl.float32)
        for first in range(start, end, N):
            n = first + tl.arange(0, N)
            here = n < end
            slots = tl.load(segment_slots + offset + n, mask=here, other=0)
            shown = here[None, :] & inside[:, None]
            if WINDOWED:
                shown = shown & (depth[:, None] - (first_depth + n)[None, :] < window)
            largest, total, sums = _add_tile(
                q, keys, values, k_base, v_base, slots, here, shown, largest, total, sums, scale, cap,
                D, E, DP, EP, CAPPED,
            )  # fmt: skip
        place = ((level * splits + split) * rows + row) * H + own_head
        tl.store(part_lse + place, tl.where(total > 0, largest + tl.log2(total), float("-inf")), mask=inside)
        tl.store(
            part_out + place.to(tl.int64)[:, None] * E + e[None, :], sums / tl.maximum(total, 1e-30)[:, None],
            mask=inside[:, None] & (e < E)[None, :],
        )  # fmt: skip


@triton.jit
def _own_part(
    query, keys, values, own_slots, lengths, part_out, part_lse, out, new_keys, new_values, row_slots,
    scale, cap, window, rows, q_row, q_head, k_head, v_head, new_k_row, new_k_head, new_v_row, new_v_head,
    slots_row, parts,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, E: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """One row against its own part, for one key head, merged with the `parts` of its segments. Writes the key and the
    value of the newest token to the pool, and starts with this token, which sees itself."""
    G: tl.constexpr = H // K
    row, head = tl.program_id(0), tl.program_id(1)
    entry = tl.arange(0, M)
    inside = entry < G
    own_head = head * G + entry
    d, e = tl.arange(0, DP), tl.arange(0, EP)
    q = tl.load(
        query + row * q_row + own_head[:, None] * q_head + d[None, :],
        mask=inside[:, None] & (d < D)[None, :], other=0.0,
    )  # fmt: skip
    length = tl.load(lengths + row)
    oldest = 0
    if WINDOWED:
        oldest = tl.maximum(length - window, 0)
    k_base, v_base = head.to(tl.int64) * k_head, head.to(tl.int64) * v_head
    newest = tl.load(row_slots + row).to(tl.int64)
    new_key = tl.load(new_keys + row * new_k_row + head * new_k_head + d, mask=d < D, other=0.0)
    new_value = tl.load(new_values + row * new_v_row + head * new_v_head + e, mask=e < E, other=0.0)
    tl.store(keys + k_base + newest * D + d, new_key, mask=d < D)
    tl.store(values + v_base + newest * E + e, new_value, mask=e < E)
    largest = tl.sum(q.to(tl.float32) * new_key.to(tl.float32)[None, :], 1) * scale
    if CAPPED:
        largest = cap * (2.0 * tl.sigmoid(2.0 * largest / cap) - 1.0)  # tanh
    largest = largest * LOG2_E
    total = tl.full([M], 1.0, tl.float32)
    sums = tl.zeros([M, EP], tl.float32) + new_value.to(tl.float32)[None, :]
    for first in range(oldest // N * N, length - 1, N):
        n = first + tl.arange(0, N)
        here = (n < length - 1) & (n >= oldest)
        slots = tl.load(own_slots + row * slots_row + n, mask=here, other=0)
        largest, total, sums = _add_tile(
            q, keys, values, k_base, v_base, slots, here, here[None, :] & inside[:, None], largest, total, sums,
            scale, cap, D, E, DP, EP, CAPPED,
        )  # fmt: skip
    for part in range(parts):
        place = (part * rows + row) * H + own_head
        other = tl.load(part_lse + place, mask=inside, other=float("-inf"))
        is_there = other > float("-inf")
        o = tl.load(
            part_out + place.to(tl.int64)[:, None] * E + e[None, :],
            mask=is_there[:, None] & (e < E)[None, :], other=0.0,
        )  # fmt: skip
        new = tl.maximum(largest, other)
        safe = tl.where(new == float("-inf"), 0.0, new)
        shrunk, weight = tl.exp2(largest - safe), tl.exp2(other - safe)
        sums = sums * shrunk[:, None] + o * weight[:, None]
        total = total * shrunk + weight
        largest = new
    place = (row * H + own_head).to(tl.int64)
    merged = sums / tl.maximum(total, 1e-30)[:, None]
    tl.store(out + place[:, None] * E + e[None, :], merged.to(q.dtype), mask=inside[:, None] & (e < E)[None, :])
