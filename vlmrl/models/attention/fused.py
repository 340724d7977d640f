"""Attention of a trainer's pass as one kernel on a GPU, in half precision; its rows are their own keys.

    flex     any prefix tree: rows in depth-first order make "key k is an ancestor of query q" two comparisons,
             k ≤ q < end of what descends from k's segment, so that the whole tree is one block-sparse FlexAttention
    varlen   sequences side by side, nothing shared: torch's variable-length flash attention; also for the vision
             tower, where every patch of an image sees every other

What both kernels need on the host is made once per micro-batch, with the pass (`plan_flex`, `plan_varlen`): a layer
waits for nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.attention.varlen import varlen_attn

from vlmrl.models.attention.prefix_tree import Segment
from vlmrl.models.transfer import to_device


class Kernel(Enum):
    """What computes attention over a micro-batch."""

    blocks = "blocks"
    """Dense blocks in float32 (tree_attention.py); on any device, in any format."""
    flex = "flex"
    varlen = "varlen"


@dataclass(frozen=True, eq=False)
class Sequences:
    """S sequences side by side."""

    starts: Tensor
    """int32 [S + 1]; first row of each, then the number of rows."""
    longest: int
    """Rows."""


FusedPlan: TypeAlias = BlockMask | Sequences

_ONE_KERNEL: dict[str, Any] = {"FORCE_USE_FLEX_ATTENTION": True}
"""Below 128 rows FlexAttention would take a kernel that is made for decoding, and of torch 2.11 that one has no
configuration for some lengths (68 rows): the pass would fail."""

FLEX_BLOCK = 128
"""Rows per side of a block of FlexAttention's sparsity; its own default."""

VISION_ATTENTION = "vlmrl_flash_varlen"
"""transformers hands a vision tower's images to attention in one call, not one by one, where the name says `flash`."""


def plan_flex(segments: Sequence[Segment], device: torch.device) -> BlockMask:
    """The mask of one pass over `segments` (depth-first order; T rows in the same order).

    Which blocks of keys a block of queries touches follows from each block's extremes, without T × T of anything.
    """
    last = [int(segment.rows[-1]) + 1 for segment in segments]
    for i in reversed(range(len(segments))):
        if segments[i].parent >= 0:
            last[segments[i].parent] = max(last[segments[i].parent], last[i])
    ends = np.concatenate([np.full(len(s.rows), end) for s, end in zip(segments, last, strict=True)])
    length = len(ends)
    starts = np.arange(0, length, FLEX_BLOCK)
    stops = np.minimum(starts + FLEX_BLOCK, length)
    lowest, highest = np.minimum.reduceat(ends, starts), np.maximum.reduceat(ends, starts)
    q_start, q_stop = starts[:, None], stops[:, None]
    touched = (starts < q_stop) & (q_start < highest)
    whole = touched & (stops - 1 <= q_start) & (q_stop - 1 < lowest)

    def listed(blocks: np.ndarray) -> tuple[Tensor, Tensor]:
        """How many per row, and which, the others after them; int32 [1, 1, n] and [1, 1, n, n]."""
        order = np.argsort(~blocks, axis=1, kind="stable")
        counts = to_device(blocks.sum(1).astype(np.int32), device)
        return counts[None, None], to_device(order.astype(np.int32), device)[None, None]

    end_of = to_device(ends.astype(np.int32), device)

    def is_ancestor(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < end_of[key])

    return BlockMask.from_kv_blocks(
        *listed(touched & ~whole),
        *listed(whole),
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=is_ancestor,
        seq_lengths=(length, length),
    )


def plan_varlen(segments: Sequence[Segment], device: torch.device) -> Sequences:
    """The bounds of `segments`, none of which has a parent."""
    assert all(segment.parent < 0 for segment in segments), "a tree with shared prefixes is no row of sequences"
    lengths = [len(segment.rows) for segment in segments]
    return Sequences(to_device(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32), device), max(lengths))


def attend_fused(query: Tensor, key: Tensor, value: Tensor, plan: FusedPlan, scaling: float) -> Tensor:
    """query [1, H, T, D], key and value [1, KV, T, D] → [1, T, H, D]."""
    if isinstance(plan, Sequences):
        return _varlen(query, key, value, plan.starts, plan.longest, scaling, causal=True)
    # Within a compiled layer it is part of that layer. Uncompiled on a CPU, for tests: it has no backward pass there.
    apart = query.is_cuda and not torch.compiler.is_compiling()
    attend: Any = _compiled_flex_attention() if apart else flex_attention
    out: Tensor = attend(query, key, value, block_mask=plan, scale=scaling, enable_gqa=True, kernel_options=_ONE_KERNEL)
    return out.transpose(1, 2)


def vision_attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    **_: Any,
) -> tuple[Tensor, None]:
    """The transformers attention interface of a vision tower: query, key and value [1, H, P, D] of all images side by
    side, whose bounds are `cu_seq_lens_q` → [1, P, H, D]."""
    assert attention_mask is None, "the bounds are the mask"
    assert dropout == 0.0, "attention dropout is left out"
    return _varlen(query, key, value, cu_seq_lens_q, max_length_q, scaling, causal=False), None


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int, scaling: float, *, causal: bool
) -> Tensor:
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    window = (-1, 0) if causal else (-1, -1)
    out = varlen_attn(q, k, v, starts, starts, longest, longest, scale=scaling, window_size=window, **_GROUPED_HEADS)
    assert isinstance(out, Tensor)
    return out[None]


_GROUPED_HEADS: dict[str, Any] = (
    {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
)
"""torch 2.11 takes fewer key heads than query heads without being told."""


@cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    """Compiled once for all lengths."""
    compiled: Callable[..., Tensor] = torch.compile(flex_attention, dynamic=True)
    return compiled
