"""Attention of the embedded engine's compiled layers: one operation that the compiler does not look into.

So a layer is one graph, which takes about half of the time to compile that its four pieces would take, and one graph
serves all layers: what differs from layer to layer, the keys and values in the pool, is found inside, by the plan of
the pass. An operation takes tensors and numbers only, so the plan waits outside, per thread.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vlmrl.models.attention.plan import TreePlan
from vlmrl.models.attention.tree import attend_planned, check_call, tree_attention_forward

CACHED_ATTENTION_NAME = "vlmrl_cached"

_passes = threading.local()


@contextmanager
def passing(plan: TreePlan) -> Iterator[None]:
    """Compute a pass of `plan`: `cached_attention_forward` finds it."""
    before = getattr(_passes, "plan", None)
    _passes.plan = plan
    try:
        yield
    finally:
        _passes.plan = before


def cached_attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    tree_plan: TreePlan | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    position_ids: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """See `tree_attention_forward`; of passes inside `passing`, whose plan `tree_plan` is. No gradient."""
    if not torch.compiler.is_compiling():
        return tree_attention_forward(
            module, query, key, value, attention_mask, scaling, dropout, tree_plan=tree_plan,
            sliding_window=sliding_window, softcap=softcap, is_causal=is_causal, **others,
        )  # fmt: skip
    check_call(module, tree_plan, attention_mask, dropout, is_causal, others)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _attend_cached(query, key, value, scale, sliding_window, softcap), None


@torch.library.custom_op("vlmrl::attend_cached", mutates_args=())
def _attend_cached(
    query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """query [1, H, T, D], key [1, KV, T, D], value [1, KV, T, E] → [1, T, H, E]. Writes to the pool of the plan, which
    nothing else in a layer's graph reads."""
    plan: TreePlan = _passes.plan
    return attend_planned(query, key, value, plan, plan.by_window[window], scale, softcap)


@_attend_cached.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None, softcap: float | None) -> Tensor:
    _, heads, rows, _ = query.shape
    return query.new_empty(1, rows, heads, value.shape[-1])
