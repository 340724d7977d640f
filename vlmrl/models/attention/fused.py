"""Attention of a forward pass as one kernel on a GPU, in half precision. The rows of a trainer's pass are the keys.

    flex     any prefix tree. With the rows in depth-first order, "key k is an ancestor of query q" is two comparisons,
             k ≤ q < end of the rows that descend from k's segment, so the whole tree is one block-sparse FlexAttention.
             Windows are differences of depths; a row of an image also sees the rows up to the end of its image
    varlen   sequences side by side that share nothing: torch's variable-length flash attention, with windows, without
             attention among an image's tokens and without soft caps, for heads of at most 256 numbers. Also used by the
             vision tower, where every patch of an image attends to every other
    paths    the same kernel for a prefill of the embedded engine: the new rows of each segment and the keys of its
             whole path, which are in the KV pool

`plan_flex`, `plan_varlen` and `plan_paths` compute what the kernels need on the host once per micro-batch, so no layer
synchronizes with the GPU.
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
from torch.nn.functional import scaled_dot_product_attention

from vlmrl.models.attention.prefix_tree import Segment, depths
from vlmrl.models.attention.rules import AttentionRule
from vlmrl.models.compiling import for_all_sizes
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
    window: int | None = None
    """See `AttentionRule.window`."""


@dataclass(frozen=True, eq=False)
class Paths:
    """The rows of S segments, which see the keys of their paths in the KV pool."""

    starts: Tensor
    """int32 [S + 1]; the first row of each segment, then the number of rows."""
    longest: int
    """Rows of the longest segment."""
    slots: Tensor
    """int64 [K]; the slots of one path after the other. A path ends with the rows of its segment."""
    starts_of_paths: Tensor
    """int32 [S + 1]; the first key of each path in `slots`, then K."""
    longest_path: int
    """Keys of the longest path."""
    window: int | None = None
    """See `AttentionRule.window`."""


FusedPlan: TypeAlias = BlockMask | Sequences

FLEX_BLOCK = 128
"""Rows per side of a sparsity block of FlexAttention; its own default."""

SHORT_PASS_ROWS = FLEX_BLOCK
"""A pass of at most as many rows runs without FlexAttention and in layers that are not compiled. torch would compile
all of it once more: FlexAttention has other code below 128 rows, and a single block is a size of 1."""

FLASH_HEAD_SIZE = 256
"""Largest size of a head that flash attention has kernels for."""

LARGE_HEAD_OPTIONS: dict[str, Any] = {"fwd_BLOCK_M": 32, "fwd_BLOCK_N": 32, "fwd_num_stages": 1}
"""Tiles of FlexAttention's forward pass for larger heads (Gemma 4 has 512). Its own choice for them needs 257 KiB of
shared memory, and a block on an H100 has 227."""

VISION_ATTENTION, VISION_ATTENTION_BY_IMAGE = "vlmrl_flash_varlen", "vlmrl_flash_by_image"
"""Names in transformers' registry. Only because they contain `flash`, a vision tower hands all images to attention in
one call instead of one by one."""


@dataclass(frozen=True, eq=False)
class _Rows:
    """What decides which of T rows see each other; int64 [T] each. Query q sees key k where k ≤ last[q], q < end[k] and
    oldest[q] ≤ depth[k]."""

    last: np.ndarray
    """The last row that the row sees: itself, or the end of its image."""
    end: np.ndarray
    """The end of the rows that descend from the row's segment."""
    depth: np.ndarray
    """Rows before the row on its path."""
    oldest: np.ndarray
    """The smallest depth that the row sees."""

    @staticmethod
    def of(segments: Sequence[Segment], rule: AttentionRule) -> _Rows:
        """`segments` in depth-first order, rows in the same order."""
        ends = [int(segment.rows[-1]) + 1 for segment in segments]
        for i in reversed(range(len(segments))):
            if segments[i].parent >= 0:
                ends[segments[i].parent] = max(ends[segments[i].parent], ends[i])
        starts = depths(segments)
        depth = np.concatenate([start + np.arange(len(s.rows)) for s, start in zip(segments, starts, strict=True)])
        return _Rows(
            last=np.concatenate([s.rows[0] + s.last_seen(rule.image_runs) for s in segments]),
            end=np.concatenate([np.full(len(s.rows), end) for s, end in zip(segments, ends, strict=True)]),
            depth=depth,
            oldest=np.zeros_like(depth) if rule.window is None else depth - rule.window + 1,
        )


def plan_flex(segments: Sequence[Segment], device: torch.device, rule: AttentionRule) -> BlockMask:
    """The mask of one pass over `segments` (depth-first order; T rows in the same order).

    Which blocks of keys a block of queries touches follows from the extremes of each block, without any T × T array.
    """
    rows = _Rows.of(segments, rule)
    length = len(rows.end)
    starts = np.arange(0, length, FLEX_BLOCK)
    first, stop = starts, np.minimum(starts + FLEX_BLOCK, length)

    def low(x: np.ndarray) -> np.ndarray:
        return np.minimum.reduceat(x, starts)

    def high(x: np.ndarray) -> np.ndarray:
        return np.maximum.reduceat(x, starts)

    touched = (first <= high(rows.last)[:, None]) & (first[:, None] < high(rows.end))
    touched &= low(rows.oldest)[:, None] <= high(rows.depth)
    whole = touched & (stop - 1 <= low(rows.last)[:, None]) & (stop[:, None] - 1 < low(rows.end))
    whole &= high(rows.oldest)[:, None] <= low(rows.depth)

    def listed(blocks: np.ndarray) -> tuple[Tensor, Tensor]:
        """Per row of `blocks`, how many are set and their indices, then the indices of the others; int32 [1, 1, n] and
        [1, 1, n, n]."""
        order = np.argsort(~blocks, axis=1, kind="stable")
        counts = to_device(blocks.sum(1).astype(np.int32), device)
        return counts[None, None], to_device(order.astype(np.int32), device)[None, None]

    return BlockMask.from_kv_blocks(
        *listed(touched & ~whole),
        *listed(whole),
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=_mask_function(rows, rule, device),
        seq_lengths=(length, length),
    )


def _mask_function(rows: _Rows, rule: AttentionRule, device: torch.device) -> Callable[..., Tensor]:
    """Whether a query sees a key; it reads no array that the rule does not need."""

    def tensor(array: np.ndarray) -> Tensor:
        return to_device(array.astype(np.int32), device)

    end = tensor(rows.end)

    def is_ancestor(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < end[key])

    if rule == AttentionRule():
        return is_ancestor
    last, depth, oldest = tensor(rows.last), tensor(rows.depth), tensor(rows.oldest)

    def is_visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= last[query]) & (query < end[key]) & (oldest[query] <= depth[key])

    return is_visible


def plan_varlen(segments: Sequence[Segment], device: torch.device, rule: AttentionRule) -> Sequences:
    """The bounds of `segments`; no segment may have a parent, and no row may see a later one."""
    assert all(segment.parent < 0 for segment in segments), "varlen attention cannot express shared prefixes"
    assert not rule.image_runs, "varlen attention cannot express attention among the tokens of an image"
    lengths = [len(segment.rows) for segment in segments]
    starts = to_device(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32), device)
    return Sequences(starts, max(lengths), rule.window)


MOST_PATH_KEYS = 1 << 19
"""Keys of all paths of a pass, which are copied out of the pool for each layer: 2 GiB with 8 key heads of 128."""


def plan_paths(segments: Sequence[Segment], device: torch.device) -> Paths | None:
    """The bounds of the rows of `segments` and of their paths, without a window; segments without rows are in the KV
    pool already. None for more keys than `MOST_PATH_KEYS`."""
    lengths, keys, paths, made = list[int](), list[int](), list[np.ndarray](), list[np.ndarray]()
    for segment in segments:
        above = paths[segment.parent] if segment.parent >= 0 else segment.slots[:0]
        paths.append(np.concatenate([above, segment.slots]))
        if len(segment.rows):
            made.append(paths[-1])
            lengths.append(len(segment.rows))
            keys.append(len(paths[-1]))
    if sum(keys) > MOST_PATH_KEYS:
        return None

    def bounds(sizes: Sequence[int]) -> Tensor:
        return to_device(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32), device)

    slots = to_device(np.concatenate(made), device)
    return Paths(bounds(lengths), max(lengths), slots, bounds(keys), max(keys))


def attend_paths(query: Tensor, key: Tensor, value: Tensor, plan: Paths, scaling: float) -> Tensor:
    """Attention of one layer: query [H, T, D], key and value [KV, capacity, D] of the pool → [T, H, D]."""
    q = query.transpose(0, 1).contiguous()
    k, v = (pool.index_select(1, plan.slots).transpose(0, 1).contiguous() for pool in (key, value))
    window = (-1 if plan.window is None else plan.window - 1, 0)
    # The last row of a segment is aligned with the last key of its path, as flash attention has it since 2.1.
    out = varlen_attn(
        q, k, v, plan.starts, plan.starts_of_paths, plan.longest, plan.longest_path,
        scale=scaling, window_size=window, **VARLEN_OPTIONS,
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out


def fits_flash(decoder: torch.nn.Module) -> bool:
    """Whether flash attention computes all heads of `decoder`: none is too large, and values are as long as keys."""
    for module in decoder.modules():
        key = getattr(module, "qk_head_dim", None) or getattr(module, "head_dim", None)
        if isinstance(key, int) and (key > FLASH_HEAD_SIZE or getattr(module, "v_head_dim", key) != key):
            return False
    return True


def attend_fused(
    query: Tensor, key: Tensor, value: Tensor, plan: FusedPlan, scaling: float, softcap: float | None = None
) -> Tensor:
    """Attention of one layer: query [1, H, T, D], key and value [1, KV, T, D] → [1, T, H, D]. With `softcap` c a score
    s becomes c · tanh(s / c)."""
    if isinstance(plan, Sequences):
        assert softcap is None, "varlen attention has no soft caps"
        window = (-1 if plan.window is None else plan.window - 1, 0)
        return _varlen(query, key, value, plan.starts, plan.longest, scaling, window)
    # In a compiled layer it is compiled with that layer. On a CPU (tests) it stays uncompiled and has no backward pass.
    compile_here = query.is_cuda and not torch.compiler.is_compiling()
    attend: Any = _compiled_flex_attention() if compile_here else flex_attention

    score_mod = None if softcap is None else _soft_cap(torch.full((), softcap, device=query.device))
    out: Tensor = attend(
        query,
        key,
        value,
        score_mod=score_mod,
        block_mask=plan,
        scale=scaling,
        enable_gqa=True,
        kernel_options=FLEX_KERNEL_OPTIONS | (LARGE_HEAD_OPTIONS if query.shape[-1] > FLASH_HEAD_SIZE else {}),
    )
    return out.transpose(1, 2)


def _soft_cap(cap: Tensor) -> Callable[..., Tensor]:
    """Turn a score s into cap · tanh(s / cap). A tensor, because FlexAttention takes no number that a compiled layer
    treats as dynamic."""

    def capped(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return capped


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
    return _varlen(query, key, value, cu_seq_lens_q, max_length_q, scaling, window=(-1, -1)), None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def vision_attention_by_image(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    *,
    cu_seq_lens_q: Tensor,
    **_: Any,
) -> tuple[Tensor, None]:
    """As `vision_attention_forward`, for any dtype and device: torch's own attention, image by image. A compiled layer
    calls it as it is. transformers' own loop over images would be compiled again for each number of images."""
    assert attention_mask is None, "the bounds replace the mask"
    assert dropout == 0.0, "attention dropout is not supported"
    lengths = cu_seq_lens_q.diff().tolist()
    images = zip(*(torch.split(x, lengths, dim=2) for x in (query, key, value)), strict=True)
    outputs = [scaled_dot_product_attention(q, k, v, scale=scaling).transpose(1, 2) for q, k, v in images]
    return torch.cat(outputs, dim=1), None


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    longest: int,
    scaling: float,
    window: tuple[int, int],
) -> Tensor:
    """`window`: how many keys before and after its own a row sees; −1 for all."""
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    out = varlen_attn(q, k, v, starts, starts, longest, longest, scale=scaling, window_size=window, **VARLEN_OPTIONS)
    assert isinstance(out, Tensor)
    return out[None]


@cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    """FlexAttention, compiled once for all lengths."""
    compiled: Callable[..., Tensor] = for_all_sizes(flex_attention)
    return compiled
