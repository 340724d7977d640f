"""Attention of a trainer's forward pass as one kernel on a GPU, in half precision. The rows of the pass are the keys.

    flex     any prefix tree. With the rows in depth-first order, "key k is an ancestor of query q" is two comparisons,
             k ≤ q < end of the rows that descend from k's segment, so the whole tree is one block-sparse FlexAttention
    varlen   sequences side by side that share nothing: torch's variable-length flash attention. Also used by the vision
             tower, where every patch of an image attends to every other

`plan_flex` and `plan_varlen` compute what the kernels need on the host once per micro-batch, so no layer synchronizes
with the GPU.
"""

from __future__ import annotations

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
from vlmrl.models.features import to_device
from vlmrl.models.old_torch import FLEX_KERNEL_OPTIONS, VARLEN_OPTIONS


class Kernel(Enum):
    """Which kernel computes attention over a micro-batch."""

    blocks = "blocks"
    """Dense blocks in float32 (tree.py), on any device and for any dtype."""
    flex = "flex"
    """FlexAttention over a prefix tree."""
    varlen = "varlen"
    """Flash attention over separate sequences."""


@dataclass(frozen=True, eq=False)
class Sequences:
    """S sequences side by side."""

    starts: Tensor
    """int32 [S + 1]; the first row of each sequence, then the number of rows."""
    longest: int
    """Rows of the longest sequence."""


FusedPlan: TypeAlias = BlockMask | Sequences

FLEX_BLOCK = 128
"""Rows per side of a sparsity block of FlexAttention; its own default."""

VISION_ATTENTION = "vlmrl_flash_varlen"
"""Name in transformers' registry. Only because it contains `flash`, a vision tower hands all images to attention in one
call instead of one by one."""


def plan_flex(segments: Sequence[Segment], device: torch.device) -> BlockMask:
    """The mask of one pass over `segments` (depth-first order; T rows in the same order).

    Which blocks of keys a block of queries touches follows from the extremes of each block, without any T × T array.
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
        """Per row of `blocks`, how many are set and their indices, then the indices of the others; int32 [1, 1, n] and
        [1, 1, n, n]."""
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
    """The bounds of `segments`; no segment may have a parent."""
    assert all(segment.parent < 0 for segment in segments), "varlen attention cannot express shared prefixes"
    lengths = [len(segment.rows) for segment in segments]
    return Sequences(to_device(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32), device), max(lengths))


def attend_fused(query: Tensor, key: Tensor, value: Tensor, plan: FusedPlan, scaling: float) -> Tensor:
    """Attention of one layer: query [1, H, T, D], key and value [1, KV, T, D] → [1, T, H, D]."""
    if isinstance(plan, Sequences):
        return _varlen(query, key, value, plan.starts, plan.longest, scaling, causal=True)
    # In a compiled layer it is compiled with that layer. On a CPU (tests) it stays uncompiled and has no backward pass.
    compile_here = query.is_cuda and not torch.compiler.is_compiling()
    attend: Any = _compiled_flex_attention() if compile_here else flex_attention
    out: Tensor = attend(
        query, key, value, block_mask=plan, scale=scaling, enable_gqa=True, kernel_options=FLEX_KERNEL_OPTIONS
    )
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
    """transformers' attention interface for a vision tower: query, key and value [1, H, P, D] of all images side by
    side → [1, P, H, D]. `cu_seq_lens_q` are the bounds of the images."""
    assert attention_mask is None, "the bounds replace the mask"
    assert dropout == 0.0, "attention dropout is not supported"
    return _varlen(query, key, value, cu_seq_lens_q, max_length_q, scaling, causal=False), None


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int, scaling: float, *, causal: bool
) -> Tensor:
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    window = (-1, 0) if causal else (-1, -1)
    out = varlen_attn(q, k, v, starts, starts, longest, longest, scale=scaling, window_size=window, **VARLEN_OPTIONS)
    assert isinstance(out, Tensor)
    return out[None]


@cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    """FlexAttention, compiled once for all lengths."""
    compiled: Callable[..., Tensor] = torch.compile(flex_attention, dynamic=True)
    return compiled
