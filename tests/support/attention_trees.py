"""Random prefix trees, and dense attention in float64 to compare tree attention with."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from vlmrl.models.attention import plan as tree_plan
from vlmrl.models.attention.plan import TreePlan, plan_tree
from vlmrl.models.attention.prefix_tree import Segment
from vlmrl.models.attention.rules import CAUSAL, AttentionRules
from vlmrl.models.attention.tree import tree_attention_forward

CPU = torch.device("cpu")
MODULE: Any = SimpleNamespace(layer_idx=0)
HEADS, KV_HEADS, DIM, SCALE = 6, 2, 8, 0.3
THRESHOLDS = [1, 30, 16384]
"""Values of MIN_SHARED_PAIRS for which all segments with rows below them, some, or none are shared."""


@dataclass(frozen=True)
class Tree:
    """A random tree; `cached` segments have their keys in the pool already and no rows."""

    parents: tuple[int, ...]
    lengths: tuple[int, ...]
    cached: tuple[bool, ...]

    def segments(self) -> tuple[list[Segment], int]:
        """Segments whose rows are numbered in order, and the first slot of the rows: cached keys come before it."""
        first_slot = sum(n for n, cached in zip(self.lengths, self.cached, strict=True) if cached)
        # Cached keys have slots in arbitrary order, as in a pool that turns and branches have filled.
        free = iter(np.random.default_rng(0).permutation(first_slot))
        segments, rows = [], 0
        for parent, length, cached in zip(self.parents, self.lengths, self.cached, strict=True):
            if cached:
                slots = np.array([next(free) for _ in range(length)], np.int64)
                segments.append(Segment(parent, slots, np.empty(0, np.int64)))
            else:
                own = np.arange(rows, rows + length)
                segments.append(Segment(parent, first_slot + own, own))
                rows += length
        return segments, first_slot


def dense_mask(segments: list[Segment]) -> NDArray[np.int64]:
    """int64 [rows, slots]; 1 where the slot is the row's own or an ancestor's, straight from the definition."""
    num_rows = sum(len(s.rows) for s in segments)
    mask = np.zeros((num_rows, sum(len(s.slots) for s in segments)), np.int64)
    for segment in segments:
        above: list[int] = []
        index = segment.parent
        while index >= 0:
            above += segments[index].slots.tolist()
            index = segments[index].parent
        for i, row in enumerate(segment.rows):
            mask[row, above] = 1
            mask[row, segment.slots[: i + 1]] = 1
    return mask


@st.composite
def trees(draw: st.DrawFn, pool: bool = False) -> Tree:
    parents: list[int] = []
    cached: list[bool] = []
    open_path = [-1]
    for index in range(draw(st.integers(1, 9))):
        depth = draw(st.integers(0, len(open_path) - 1))
        parents.append(open_path[depth])
        del open_path[depth + 1 :]
        open_path.append(index)
        cached.append(pool and (parents[-1] < 0 or cached[parents[-1]]) and draw(st.booleans()))
    if all(cached):
        cached = [False] * len(cached)
    return Tree(tuple(parents), tuple(draw(st.integers(1, 9)) for _ in parents), tuple(cached))


def plan_of(segments: list[Segment], threshold: int, rules: AttentionRules = CAUSAL) -> TreePlan:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tree_plan, "MIN_SHARED_PAIRS", threshold)
        return plan_tree(segments, CPU, rules)


def dense(mask: Tensor, q: Tensor, k: Tensor, v: Tensor, *, softcap: float | None = None) -> Tensor:
    """q [H, T, D], k and v [KV, S, D], mask [T, S] → [H, T, D]."""
    k, v = (x.repeat_interleave(len(q) // len(k), 0) for x in (k, v))
    scores = q @ k.transpose(1, 2) * SCALE
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    return torch.softmax(scores.masked_fill(mask == 0, float("-inf")), -1) @ v


def noise(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).float()


def attend(plan: TreePlan, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """The same as `dense`, by the plan."""
    out, _ = tree_attention_forward(MODULE, q[None], k[None], v[None], None, SCALE, tree_plan=plan, **options)
    return out[0].transpose(0, 1)


def assert_close(found: Tensor, wanted: Tensor, tolerance: float = 3e-6, terms: float = 0.0) -> None:
    """Relative to the whole tensor, because an entry may be a small difference of terms of size `terms`."""
    error = float((found.detach().double() - wanted.detach()).norm())
    assert error <= tolerance * (float(wanted.detach().norm()) + terms)
