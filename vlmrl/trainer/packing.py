"""Samples → micro-batches. The only place that knows how samples share a forward pass.

    tree     each distinct prefix token once per micro-batch (vlmrl.models.prefix_tree)
    varlen   samples side by side, nothing shared; the same rows and plan with sharing turned off
    none     one sample per micro-batch; the reference

Samples are sorted by their tokens, so the cost of the next one is what follows its longest common prefix with the one
before it. `cut` divides the sorted row into micro-batches within the token budget, of all ways to do so the one that
computes least: between groups, where little is shared, and evenly. Equal samples collapse into one row each, while the
loss still counts every one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from vlmrl.models.fused_attention import Kernel
from vlmrl.models.positions import PositionFunction
from vlmrl.models.prefix_tree import ImageKeys, Segment, build_tree, common_prefix, sort_key
from vlmrl.models.tree_attention import TreePlan, make_plan
from vlmrl.trainer.config import Packing
from vlmrl.types import ImageItem, IntArray, Placeholder, TrainingSample


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """One forward/backward. T packed rows, U rows with a loss, N loss tokens (N ≥ U where samples coincide)."""

    token_ids: Tensor
    """int64 [T]."""
    position_ids: Tensor
    """int64 [4, T]; each row's position in its own sample: text, then MRoPE time, height, width."""
    mm_token_type_ids: Tensor
    """int64 [T]; 0 text, 1 image."""
    images: tuple[ImageItem, ...]
    """Each distinct image once."""
    feature_rows: Tensor
    """int64 [placeholder rows]; which image feature each takes, in row order."""
    plan: TreePlan
    loss_rows: Tensor
    """int64 [U]; rows whose hidden state predicts a loss token (the row before it)."""
    entry: Tensor
    """int64 [N]; index into `loss_rows`."""
    targets: Tensor
    """int64 [N]; the token that was sampled."""
    inference_logprobs: Tensor
    """float32 [N]; natural log."""
    advantages: Tensor
    """float32 [N]."""
    versions: Tensor
    """int64 [N]; policy version that sampled the token."""
    sample_index: Tensor
    """int64 [N]; index of the sample in the batch."""


def pack(
    samples: Sequence[TrainingSample],
    packing: Packing,
    token_budget: int,
    positions: PositionFunction,
    device: torch.device,
    *,
    kernel: Kernel = Kernel.blocks,
) -> list[MicroBatch]:
    """Micro-batches that hold each loss token of `samples` exactly once, planned for attention by `kernel`."""
    image_keys = ImageKeys()
    keys = [image_keys.keys(sample.token_ids, sample.placeholders) for sample in samples]
    # One entry per distinct sequence, in sorted order; equal samples stand together.
    members: dict[bytes, list[int]] = {}
    for index, key in enumerate(keys):
        members.setdefault(sort_key(key), []).append(index)
    if packing is Packing.tree:
        distinct = [members[key] for key in sorted(members)]
    else:
        distinct = [[index] for key in sorted(members) for index in members[key]]

    sequences = [keys[group[0]] for group in distinct]
    shared = [0] * len(sequences)
    if packing is Packing.tree:
        shared[1:] = [common_prefix(before, sequence) for before, sequence in pairwise(sequences)]
    bounds = cut([len(s) for s in sequences], shared, 1 if packing is Packing.none else token_budget)
    return [
        _micro_batch(samples, keys, distinct[start:end], packing, positions, device, kernel) for start, end in bounds
    ]


FIXED_COST = 512
"""What a micro-batch costs beside its rows, in rows: kernels that are not filled, gradients that are added up."""

UNEVENNESS = 64
"""Micro-batches of unequal size cost a 64th of their rows at most: rather a few more rows than one that is all but
empty while the others are full."""


def cut(lengths: Sequence[int], shared: Sequence[int], token_budget: int) -> list[tuple[int, int]]:
    """Divide a row of sequences into micro-batches → (start, end) of each, in order.

    Sequence i has `lengths[i]` tokens, the first `shared[i]` of them computed already if the sequence before it is in
    the same micro-batch. None exceeds `token_budget` tokens but a sequence that does so alone. Least in
    Σ (tokens + FIXED_COST + tokens² / (UNEVENNESS · budget)); exact, by dynamic programming over where the last one
    starts.

    Two groups of three that share 20 tokens of 22, under a budget of 30: the second is not begun in the first.

    >>> cut([22] * 6, [0, 20, 20, 1, 20, 20], 30)
    [(0, 3), (3, 6)]
    """
    count = len(lengths)
    full, known = np.array(lengths, np.int64), np.array(shared, np.int64)
    ends = np.concatenate([[0], np.cumsum(full - known)])
    best = np.concatenate([[0.0], np.full(count, np.inf)])
    begins = np.zeros(count + 1, np.int64)
    first = 0
    for end in range(1, count + 1):
        # Tokens of [start, end) for every start; fewer as the start moves right, so that starts too far back stay so.
        tokens = ends[end] - ends[first:end] + known[first:end]
        fits = tokens <= token_budget
        fits[-1] = True
        skipped = int(fits.argmax())
        first, tokens = first + skipped, tokens[skipped:]
        costs = best[first:end] + tokens + FIXED_COST + tokens.astype(float) ** 2 / (UNEVENNESS * token_budget)
        begins[end] = first + int(costs.argmin())
        best[end] = costs.min()
    bounds = []
    end = count
    while end > 0:
        bounds.append((int(begins[end]), end))
        end = int(begins[end])
    return bounds[::-1]


def _micro_batch(
    samples: Sequence[TrainingSample],
    keys: Sequence[IntArray],
    groups: Sequence[Sequence[int]],
    packing: Packing,
    positions: PositionFunction,
    device: torch.device,
    kernel: Kernel,
) -> MicroBatch:
    tree = build_tree([keys[group[0]] for group in groups], share=packing is Packing.tree)
    token_ids = np.empty(tree.num_rows, np.int64)
    position_ids = np.empty((4, tree.num_rows), np.int64)
    types = np.empty(tree.num_rows, np.int64)
    images: dict[str, ImageItem] = {}
    shown: dict[int, ImageItem] = {}
    """First row of a placeholder run → its image."""
    columns: list[tuple[IntArray, IntArray, TrainingSample, int]] = []
    placed: dict[tuple[int, tuple[Placeholder, ...]], IntArray] = {}
    """Length and placeholders → positions: of siblings they are the same."""
    for group, rows, new_from in zip(groups, tree.rows, tree.new_from, strict=True):
        sample = samples[group[0]]
        added = rows[new_from:]
        token_ids[added] = sample.token_ids[new_from:]
        types[added] = sample.mm_token_type_ids[new_from:]
        place = len(sample.token_ids), sample.placeholders
        if place not in placed:
            placed[place] = positions(len(sample.token_ids), sample.placeholders, sample.images)
        # Positions depend on the prefix alone, so the shared part has the same ones in every sample.
        position_ids[:, added] = placed[place][:, new_from:]
        for placeholder, image in zip(sample.placeholders, sample.images, strict=True):
            images.setdefault(image.hash, image)
            shown.setdefault(int(rows[placeholder.offset]), images[image.hash])
        for index in group:
            where = np.flatnonzero(samples[index].loss_mask)
            assert not len(where) or where[0] > 0, "the first token of a sample cannot have a loss"
            columns.append((rows[where - 1], where, samples[index], index))

    first_feature, total = {}, 0
    for image in images.values():
        first_feature[image.hash] = total
        total += image.num_tokens
    feature_rows = [
        np.arange(first_feature[image.hash], first_feature[image.hash] + image.num_tokens)
        for _, image in sorted(shown.items(), key=lambda item: item[0])
    ]
    loss_rows, entry = np.unique(np.concatenate([rows for rows, *_ in columns]), return_inverse=True)
    segments = [
        Segment(parent, slots=np.arange(start, end), rows=np.arange(start, end)) for parent, start, end in tree.segments
    ]

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    def gather(name: str) -> Tensor:
        return tensor(np.concatenate([getattr(sample, name)[where] for _, where, sample, _ in columns]))

    return MicroBatch(
        token_ids=tensor(token_ids),
        position_ids=tensor(position_ids),
        mm_token_type_ids=tensor(types),
        images=tuple(images.values()),
        feature_rows=tensor(np.concatenate([np.empty(0, np.int64), *feature_rows])),
        plan=make_plan(kernel, segments, device),
        loss_rows=tensor(loss_rows),
        entry=tensor(entry),
        targets=gather("token_ids"),
        inference_logprobs=gather("inference_logprobs"),
        advantages=gather("advantages"),
        versions=gather("versions"),
        sample_index=tensor(np.concatenate([np.full(len(where), index) for _, where, _, index in columns])),
    )
