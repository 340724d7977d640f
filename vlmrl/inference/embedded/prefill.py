"""Prefill: compute the keys and values that the KV cache lacks for the prompts of a batch.

All distinct prompts form one prefix tree, so a token that several prompts share is one row of one forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from vlmrl.inference.embedded.cached_policy import CachedPolicy
from vlmrl.inference.embedded.requests import Request
from vlmrl.models.attention.layer_cache import PrefixStates
from vlmrl.models.attention.plan import plan_prefill
from vlmrl.models.attention.prefix_tree import PrefixTree, Segment, build_tree, image_ends, sort_key
from vlmrl.models.attention.recurrent import StatePlan, plan_states
from vlmrl.types import IntArray, MMItem, Prompt, mm_token_type_ids


@dataclass(eq=False)
class DistinctPrompt:
    """A prompt of the batch, once for all requests that have it. P is its length in tokens."""

    prompt: Prompt
    keys: IntArray
    """int64 [P]; token ids, with an image's number (`ImageKeys`) inside its placeholder."""
    cached: int = 0
    """Leading tokens whose keys and values are in the KV cache."""
    cached_slots: IntArray = field(default_factory=lambda: np.empty(0, np.int64))
    """int64 [cached]; their slots."""
    cached_states: PrefixStates = field(default_factory=dict)
    """After these tokens; empty for a model whose layers carry no state."""
    next_position: int = 0
    """MRoPE position of the first sampled token."""
    next_text_position: int = 0
    """Text position of the first sampled token: P."""
    segment: int = -1
    """Index of the segment that the prompt ends in."""


@dataclass(frozen=True, eq=False)
class Prefilled:
    """The prompts of a batch, in the KV cache."""

    slots: list[IntArray]
    """Per prompt, int64 [P]: the slot of each token."""
    hidden: Tensor
    """float [prompts, hidden]; the hidden state of each prompt's last token."""
    segments: list[Segment]
    """The prefix tree of the prompts."""
    states: list[PrefixStates]
    """Per prompt, after its last token; empty for a model whose layers carry no state."""


def distinct_prompts(model: CachedPolicy, requests: Sequence[Request]) -> tuple[list[DistinctPrompt], list[int]]:
    """Return the distinct prompts in sorted order, and the index of each request's prompt.

    Each prompt gets the longest cached prefix among the sessions that send it. Layers that carry a state have it only
    after the last token of a turn, so there the prompt must be longer than the turn.
    """
    by_key: dict[bytes, DistinctPrompt] = {}
    requested: list[bytes] = []
    seen: dict[int, bytes] = {}
    for request in requests:
        prompt = request.prompt
        key = seen.get(id(prompt))
        if key is None:
            keys = model.image_keys.keys(prompt.token_ids, prompt.placeholders)
            key = seen[id(prompt)] = sort_key(keys)
            by_key.setdefault(key, DistinctPrompt(prompt, keys))
        distinct = by_key[key]
        for turn in request.session.turns:
            if turn.version != model.version or len(turn.keys) <= distinct.cached:
                continue
            n = min(len(turn.keys), len(distinct.keys) - 1)
            is_whole = n == len(turn.keys) or not model.policy.is_recurrent
            if is_whole and np.array_equal(turn.keys[:n], distinct.keys[:n]):
                distinct.cached, distinct.cached_slots, distinct.cached_states = n, turn.slots[:n], turn.states
        requested.append(key)
    order = {key: i for i, key in enumerate(sorted(by_key))}
    return [by_key[key] for key in order], [order[key] for key in requested]


def prefill(model: CachedPolicy, prompts: Sequence[DistinctPrompt]) -> tuple[Prefilled, int]:
    """Compute what the KV cache lacks of `prompts` → the result, and the number of rows that were computed.

    `prompts` are distinct and sorted by `sort_key`. Sets their `next_position`, `next_text_position` and `segment`.
    """
    tree = build_tree([prompt.keys for prompt in prompts])
    slot = _cached_slots(tree, prompts)
    states = {
        int(nodes[p.cached - 1]): p.cached_states for p, nodes in zip(prompts, tree.rows, strict=True) if p.cached
    }
    if model.policy.is_recurrent:
        _compute_up_to_states(tree, slot, states)
    cached_states = {int(slot[node]): each for node, each in states.items()}
    new = np.flatnonzero(slot < 0)
    first_slot = model.kv_cache.allocate(len(new))
    slot[new] = np.arange(first_slot, first_slot + len(new))
    row = np.full(tree.num_rows, -1, np.int64)
    row[new] = np.arange(len(new))

    inputs = _inputs(model, tree, prompts, row, len(new))
    segments = cut_segments(tree, prompts, slot, row, inputs.mm_token_type_ids)
    plan = plan_prefill(segments, model.device, model.policy.kernel(shared=False), model.policy.rules)
    if model.policy.is_recurrent:
        plan.states = _plan_states(segments, cached_states, prompts, model.device)
    last_rows = np.array([row[nodes[-1]] for nodes in tree.rows])
    hidden = model.forward(
        inputs.token_ids, inputs.position_ids, inputs.mm_token_type_ids, inputs.mm_items, plan, first_slot
    )
    slots = [slot[nodes] for nodes in tree.rows]
    after = [{} if plan.states is None else plan.states.ends[prompt.segment] for prompt in prompts]
    return Prefilled(slots, hidden[torch.from_numpy(last_rows)], segments, after), len(new)


def _cached_slots(tree: PrefixTree, prompts: Sequence[DistinctPrompt]) -> IntArray:
    """int64 [nodes]: the cached slot of each node of the tree, −1 for a node that this pass computes."""
    slot = np.full(tree.num_rows, -1, np.int64)
    for prompt, nodes in zip(prompts, tree.rows, strict=True):
        slot[nodes[: prompt.cached]] = prompt.cached_slots
    # The last token of a prompt is computed even where another session has it in the cache: sampling needs its
    # hidden state.
    slot[[nodes[-1] for nodes in tree.rows]] = -1
    return slot


def _compute_up_to_states(tree: PrefixTree, slot: IntArray, states: Mapping[int, PrefixStates]) -> None:
    """Have the pass compute again, by `slot` = −1, what leads from a node of `states`, or from the start, to a node
    that it computes: layers that carry a state cannot start elsewhere."""
    for nodes in tree.rows:
        fresh = slot[nodes] < 0
        for last in np.flatnonzero(fresh[1:] & ~fresh[:-1])[::-1]:
            while last >= 0 and slot[nodes[last]] >= 0 and int(nodes[last]) not in states:
                slot[nodes[last]] = -1
                last -= 1


def _plan_states(
    segments: Sequence[Segment],
    cached: Mapping[int, PrefixStates],
    prompts: Sequence[DistinctPrompt],
    device: torch.device,
) -> StatePlan:
    """`cached`: slot → the states after its token. Keeps the states after each prompt."""
    starts = {
        index: cached[int(segments[segment.parent].slots[-1])]
        for index, segment in enumerate(segments)
        if len(segment.rows) and segment.parent >= 0 and not len(segments[segment.parent].rows)
    }
    return plan_states(segments, device, starts, [prompt.segment for prompt in prompts])


@dataclass(frozen=True, eq=False)
class _Inputs:
    """What the forward pass reads, for its T rows."""

    token_ids: IntArray
    """int64 [T]."""
    position_ids: IntArray
    """int64 [4, T]."""
    mm_token_type_ids: IntArray
    """int64 [T]."""
    mm_items: list[MMItem]
    """In the order of their placeholders in the rows."""


def _inputs(
    model: CachedPolicy, tree: PrefixTree, prompts: Sequence[DistinctPrompt], row: IntArray, num_rows: int
) -> _Inputs:
    """Fill the rows of the pass from the prompts. `row` int64 [nodes] is each node's row, −1 for a cached node."""
    token_ids = np.empty(num_rows, np.int64)
    position_ids = np.empty((4, num_rows), np.int64)
    types = np.empty(num_rows, np.int64)
    shown: dict[int, MMItem] = {}
    for prompt, nodes, start in zip(prompts, tree.rows, tree.new_from, strict=True):
        source = prompt.prompt
        rows = row[nodes[start:]]
        fresh = rows >= 0
        length = len(source.token_ids)
        positions = model.policy.positions(length + 1, source.placeholders, source.mm_items)
        # Behind a video that ends the prompt, the next text has not the largest position of its frames, plus one.
        prompt.next_position = positions[1:, -1].max()
        prompt.next_text_position = length
        token_ids[rows[fresh]] = source.token_ids[start:][fresh]
        position_ids[:, rows[fresh]] = positions[:, start:length][:, fresh]
        types[rows[fresh]] = mm_token_type_ids(length, source.placeholders)[start:][fresh]
        for placeholder, item in zip(source.placeholders, source.mm_items, strict=True):
            first = int(row[nodes[placeholder.offset]])
            if first >= 0:
                shown.setdefault(first, item)
    mm_items = [item for _, item in sorted(shown.items(), key=lambda pair: pair[0])]
    return _Inputs(token_ids, position_ids, types, mm_items)


def cut_segments(
    tree: PrefixTree, prompts: Sequence[DistinctPrompt], slot: IntArray, row: IntArray, types: IntArray
) -> list[Segment]:
    """Cut each segment of the tree of `prompts` where its cached nodes end and its new rows begin → the segments; sets
    the `segment` of each prompt. `slot`, `row` int64 [nodes]; row −1 for a cached node; `types` int64 [rows] are the
    token types of the new rows."""
    segments: list[Segment] = []
    segment_of: dict[int, int] = {}
    nothing = np.empty(0, np.int64)
    for index, (parent, start, end) in enumerate(tree.segments):
        fresh_from = start + int((row[start:end] < 0).sum())
        above = segment_of[parent] if parent >= 0 else -1
        for a, b in ((start, fresh_from), (fresh_from, end)):
            if a < b:
                fresh_rows = row[a:b] if a == fresh_from else nothing
                ends = image_ends(types[fresh_rows]) if len(fresh_rows) else nothing
                segments.append(Segment(above, slot[a:b], fresh_rows, ends))
                above = len(segments) - 1
        segment_of[index] = above
    last_segments = np.searchsorted(
        [end for _, _, end in tree.segments], [nodes[-1] for nodes in tree.rows], side="right"
    )
    for prompt, last in zip(prompts, last_segments.tolist(), strict=True):
        prompt.segment = segment_of[last]
    return segments
