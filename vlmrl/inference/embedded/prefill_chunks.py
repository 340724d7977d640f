"""Prefill in several passes, so that its memory does not grow with the batch.

Prompts are sorted. Each pass computes some of them, and finds the tokens that its first prompt shares with the last
prompt of the pass before in the KV cache, unless layers carry a state, which is known after whole prompts only. One
prompt is never cut.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from vlmrl.inference.embedded.cached_policy import CachedPolicy
from vlmrl.inference.embedded.kv_plan import PASS_ROWS
from vlmrl.inference.embedded.prefill import DistinctPrompt, Prefilled, cut_segments, prefill
from vlmrl.models.attention.fused import MOST_PATH_KEYS, Kernel
from vlmrl.models.attention.prefix_tree import Segment, build_tree, common_prefix
from vlmrl.types import IntArray

PASS_PAIRS = 1 << 24
"""(query, key) pairs of a pass, if no two prompts share a token and no kernel computes attention without scores in
memory: 1 GiB of scores in float32 with 16 heads."""

PASS_KEYS = MOST_PATH_KEYS // 2
"""Tokens of the prompts of a pass, cached ones too. Segments above several prompts add their own paths to these."""


def new_tokens(prompts: Sequence[DistinctPrompt]) -> list[int]:
    """For each of the sorted prompts, its tokens that are neither cached nor in the prompt before it."""
    found = []
    for index, prompt in enumerate(prompts):
        shared = common_prefix(prompts[index - 1].keys, prompt.keys) if index else 0
        found.append(len(prompt.keys) - max(shared, prompt.cached))
    return found


def prefill_in_passes(model: CachedPolicy, prompts: Sequence[DistinctPrompt]) -> tuple[Prefilled, int]:
    """See `prefill`."""
    passes: list[list[DistinctPrompt]] = []
    has_scores = model.policy.kernel(shared=False) is not Kernel.varlen
    rows = pairs = keys = 0
    for prompt, new in zip(prompts, new_tokens(prompts), strict=True):
        length = len(prompt.keys)
        rows, pairs, keys = rows + new, pairs + new * length, keys + length
        is_full = rows > PASS_ROWS or keys > PASS_KEYS or (has_scores and pairs > PASS_PAIRS)
        if not passes or is_full:
            passes.append([])
            rows, pairs, keys = new, new * length, length
        passes[-1].append(prompt)
    if len(passes) == 1:
        return prefill(model, prompts)
    hidden, slots, states, total = [], [], [], 0
    before: tuple[DistinctPrompt, IntArray] | None = None
    for chunk in passes:
        if before is not None and not model.policy.is_recurrent:
            _use_cached(chunk[0], *before)
        found, rows = prefill(model, chunk)
        hidden.append(found.hidden)
        slots += found.slots
        states += found.states
        total += rows
        before = chunk[-1], found.slots[-1]
    return Prefilled(slots, torch.cat(hidden), whole_segments(prompts, slots), states), total


def whole_segments(prompts: Sequence[DistinctPrompt], slots: Sequence[IntArray]) -> list[Segment]:
    """The prefix tree of sorted prompts whose tokens are in the KV cache, at `slots`. Where several prompts share a
    token, the slot of one serves for all."""
    tree = build_tree([prompt.keys for prompt in prompts])
    slot = np.empty(tree.num_rows, np.int64)
    for nodes, of_prompt in zip(tree.rows, slots, strict=True):
        slot[nodes] = of_prompt
    return cut_segments(tree, prompts, slot, np.full(tree.num_rows, -1), np.empty(0, np.int64))


def _use_cached(prompt: DistinctPrompt, before: DistinctPrompt, slots: IntArray) -> None:
    """Let `prompt` start from what it shares with the prompt `before`, whose tokens are in `slots`."""
    shared = min(common_prefix(before.keys, prompt.keys), len(prompt.keys) - 1)
    if shared > prompt.cached:
        prompt.cached, prompt.cached_slots = shared, slots[:shared]
