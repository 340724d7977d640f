"""The Triton kernels of decode steps in layers that carry a state: one token of each row (row_step.py).

    gated delta net      S ← decay · S;   S ← S + k (β (v − Sᵀk))ᵀ;   out = Sᵀq      arXiv 2412.06464, eq. 10
    causal convolution   window ← window without its oldest input, and the new one;   out = Σ weight · window + bias

A state is read once and written once, and only in rows that are alive. A column of S depends on no other, and a channel
of a convolution neither, so a program takes a block of them. The kernels need a GPU, or Triton's interpreter
(`TRITON_INTERPRET=1`).
"""
# Triton's language has no types, and Triton is not installed where mypy runs.
# mypy: disable-error-code="import-not-found,untyped-decorator,no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE, WARPS = 8192, 4
"""Numbers of a program's columns, and its warps. With 64 columns of 128 numbers an H200 reads and writes 3.6 of its
4.8 TB/s, and 3.2 with 32."""

CHANNELS = 256
"""Of a convolution, per program."""


def step_by_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    beta: Tensor,
    state: Tensor,
    alive: Tensor,
    *,
    normed: bool,
) -> Tensor:
    """One token of R rows: query and key [R, 1, H, K], value [R, 1, H, V], log-decay and beta [R, 1, H], and the states
    [R, H, K, V] before it, float32 and contiguous → [R, 1, H, V].

    The states of the rows that are `alive`, bool [R], become those after the token. The others stay, and their output
    is 0. `normed`: query and key are divided by their norm. The query is divided by √K, too.
    """
    rows, _, heads, size = query.shape
    width = value.shape[-1]
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    decay, beta = (x if x.stride(-1) == 1 else x.contiguous() for x in (decay, beta))
    out = torch.empty_like(value, memory_format=torch.contiguous_format)
    padded = triton.next_power_of_2(size)
    columns = min(TILE // padded, triton.next_power_of_2(width))
    _step[(rows * heads, triton.cdiv(width, columns))](
        query, key, value, decay, beta, state, alive, out, size**-0.5,
        query.stride(0), query.stride(2), key.stride(0), key.stride(2), value.stride(0), value.stride(2),
        decay.stride(0), beta.stride(0),
        H=heads, K=size, V=width, KP=padded, N=columns, NORMED=normed, num_warps=WARPS,
    )  # fmt: skip
    return out


@triton.jit
def _step(
    query, key, value, decay, beta, state, alive, out, scale,
    q_row, q_head, k_row, k_head, v_row, v_head, decay_row, beta_row,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, N: tl.constexpr, NORMED: tl.constexpr,
):  # fmt: skip
    """N columns of one head of one row."""
    row, head = tl.program_id(0) // H, tl.program_id(0) % H
    k, v = tl.arange(0, KP), tl.program_id(1) * N + tl.arange(0, N)
    is_column = v < V
    sums = tl.zeros([N], tl.float32)
    if tl.load(alive + row):
        q = tl.load(query + row * q_row + head * q_head + k, mask=k < K, other=0.0).to(tl.float32)
        own = tl.load(key + row * k_row + head * k_head + k, mask=k < K, other=0.0).to(tl.float32)
        new = tl.load(value + row * v_row + head * v_head + v, mask=is_column, other=0.0).to(tl.float32)
        kept = tl.exp(tl.load(decay + row * decay_row + head).to(tl.float32))
        strength = tl.load(beta + row * beta_row + head).to(tl.float32)
        if NORMED:
            q = q * tl.rsqrt(tl.sum(q * q, 0) + 1e-6)
            own = own * tl.rsqrt(tl.sum(own * own, 0) + 1e-6)
        at = state + (row * H + head).to(tl.int64) * K * V + k[:, None] * V + v[None, :]
        inside = (k < K)[:, None] & is_column[None, :]
        s = tl.load(at, mask=inside, other=0.0) * kept
        change = (new - tl.sum(s * own[:, None], 0)) * strength
        s += own[:, None] * change[None, :]
        tl.store(at, s, mask=inside)
        sums = tl.sum(s * (q * scale)[:, None], 0)
    tl.store(out + (row * H + head) * V + v, sums.to(out.dtype.element_ty), mask=is_column)


def shift_by_kernel(new: Tensor, window: Tensor, weight: Tensor, bias: Tensor | None, alive: Tensor) -> Tensor:
    """One token of a causal convolution: new inputs [R, channels, 1], and the last ones [R, channels, W], contiguous,
    which are shifted by the new one in rows that are `alive`; weight [channels, k ≤ W + 1], bias [channels] →
    [R, channels, 1]."""
    rows, channels, size = window.shape
    out = torch.empty(rows, channels, 1, device=new.device, dtype=new.dtype)
    _shift[(rows, triton.cdiv(channels, CHANNELS))](
        new, window, weight, weight if bias is None else bias, alive, out, new.stride(0), new.stride(1),
        weight.stride(0), weight.stride(1),
        C=channels, W=size, K=weight.shape[1], N=CHANNELS, BIASED=bias is not None,
    )  # fmt: skip
    return out


@triton.jit
def _shift(
    new, window, weight, bias, alive, out, new_row, new_channel, w_channel, w_place,
    C: tl.constexpr, W: tl.constexpr, K: tl.constexpr, N: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """N channels of one row."""
    row = tl.program_id(0)
    c = tl.program_id(1) * N + tl.arange(0, N)
    inside = c < C
    shifts = c < C * tl.load(alive + row).to(tl.int32)
    newest = tl.load(new + row * new_row + c * new_channel, mask=inside, other=0.0)
    taken = tl.load(weight + c * w_channel + (K - 1) * w_place, mask=inside, other=0.0)
    sums = newest.to(tl.float32) * taken.to(tl.float32)
    at = window + (row.to(tl.int64) * C + c) * W
    for place in tl.static_range(W):  # the oldest first: each is read before it is written over
        kept = tl.load(at + place, mask=inside, other=0.0)
        if place >= W - K + 1:
            taken = tl.load(weight + c * w_channel + (place - (W - K) - 1) * w_place, mask=inside, other=0.0)
            sums += kept.to(tl.float32) * taken.to(tl.float32)
        if place > 0:
            tl.store(at + place - 1, kept, mask=shifts)
    tl.store(at + W - 1, newest.to(window.dtype.element_ty), mask=shifts)
    if BIASED:
        sums += tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * C + c, sums.to(out.dtype.element_ty), mask=inside)
