"""The kernels of shared_prefix.py. They need a GPU."""
# Triton's language has no types, and Triton is not installed where mypy runs.
# mypy: disable-error-code="import-not-found,untyped-decorator,no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def prefix_part(
    query, keys, values, out, lse, scale, prompt, siblings, rows, splits,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """The siblings of one group against a part of their prompt, for one key head. `keys`, `values` [groups, K, prompt,
    D]; `query` [rows, H, D]; `out` float32 [splits, rows, H, D], `lse` float32 [splits, rows, H]."""
    G: tl.constexpr = H // K
    group, head, split = tl.program_id(0) // K, tl.program_id(0) % K, tl.program_id(1)
    entry = tl.program_id(2) * M + tl.arange(0, M)
    row, own_head = group * siblings + entry // G, head * G + entry % G
    inside = entry < siblings * G
    d = tl.arange(0, D)
    q = tl.load(query + (row * H + own_head)[:, None] * D + d[None, :], mask=inside[:, None], other=0.0)
    part = tl.cdiv(tl.cdiv(prompt, splits), N) * N
    start, end = split * part, tl.minimum(split * part + part, prompt)
    base = (group * K + head).to(tl.int64) * prompt * D
    largest = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    sums = tl.zeros([M, D], tl.float32)
    for first in range(start, end, N):
        n = first + tl.arange(0, N)
        here = n < end
        k = tl.load(keys + base + n[None, :] * D + d[:, None], mask=here[None, :], other=0.0)
        scores = tl.where(here[None, :], tl.dot(q, k, out_dtype=tl.float32) * scale, float("-inf"))
        new = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp2(scores - new[:, None])
        shrunk = tl.exp2(largest - new)
        v = tl.load(values + base + n[:, None] * D + d[None, :], mask=here[:, None], other=0.0)
        sums = sums * shrunk[:, None] + tl.dot(weights.to(v.dtype), v, out_dtype=tl.float32)
        total = total * shrunk + tl.sum(weights, 1)
        largest = new
    place = (split * rows + row) * H + own_head
    tl.store(lse + place, tl.where(total > 0, largest + tl.log2(total), float("-inf")), mask=inside)
    tl.store(out + place[:, None] * D + d[None, :], sums / tl.maximum(total, 1e-30)[:, None], mask=inside[:, None])


@triton.jit
def own_part(
    query, keys, values, lengths, part_out, part_lse, out, scale, capacity, rows, splits,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """One row against its own tokens, for one key head, merged with `splits` parts of its prompt. `keys`, `values`
    [rows, K, capacity, D]; `lengths` int32 [1]; `out` [rows, H, D]."""
    G: tl.constexpr = H // K
    row, head = tl.program_id(0), tl.program_id(1)
    entry = tl.arange(0, M)
    inside = entry < G
    own_head = head * G + entry
    d = tl.arange(0, D)
    q = tl.load(query + (row * H + own_head)[:, None] * D + d[None, :], mask=inside[:, None], other=0.0)
    length = tl.load(lengths)
    base = (row * K + head).to(tl.int64) * capacity * D
    largest = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    sums = tl.zeros([M, D], tl.float32)
    for first in range(0, length, N):
        n = first + tl.arange(0, N)
        here = n < length
        k = tl.load(keys + base + n[None, :] * D + d[:, None], mask=here[None, :], other=0.0)
        scores = tl.where(here[None, :], tl.dot(q, k, out_dtype=tl.float32) * scale, float("-inf"))
        new = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp2(scores - new[:, None])
        shrunk = tl.exp2(largest - new)
        v = tl.load(values + base + n[:, None] * D + d[None, :], mask=here[:, None], other=0.0)
        sums = sums * shrunk[:, None] + tl.dot(weights.to(v.dtype), v, out_dtype=tl.float32)
        total = total * shrunk + tl.sum(weights, 1)
        largest = new
    for split in range(splits):
        place = (split * rows + row) * H + own_head
        other = tl.load(part_lse + place, mask=inside, other=float("-inf"))
        o = tl.load(part_out + place[:, None] * D + d[None, :], mask=inside[:, None], other=0.0)
        new = tl.maximum(largest, other)
        shrunk, weight = tl.exp2(largest - new), tl.exp2(other - new)
        sums = sums * shrunk[:, None] + o * weight[:, None]
        total = total * shrunk + weight
        largest = new
    place = row * H + own_head
    merged = sums / total[:, None]
    tl.store(out + place[:, None] * D + d[None, :], merged.to(q.dtype), mask=inside[:, None])
