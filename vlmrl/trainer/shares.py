"""How a batch is divided: which samples each rank computes, in which micro-batches.

    samples ─▶ sort by token ids ─▶ cut into micro-batches ─▶ deal to the ranks ─▶ one Share per rank

Sorting brings samples with long common prefixes next to each other. A micro-batch is a run of neighbors: it computes
its first sample whole, and of each further sample only what follows the prefix that it shares with the one before it.
Cutting a run in two computes that prefix twice.

Every rank gets the same number of micro-batches, because the ranks of a sharded model gather its weights together in
each forward pass. A rank that has no samples left for a pass computes a filler of two tokens whose loss counts as zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from vlmrl.config.trainer import Packing
from vlmrl.models.attention.prefix_tree import ImageKeys, common_prefix, sort_key
from vlmrl.models.vision_encoder import alike
from vlmrl.types import ImageItem, MMItem, TrainingSample

Members = tuple[tuple[int, ...], ...]
"""The samples of one micro-batch, as indices in sorted order. Samples with equal tokens and images, which are computed
only once, are in one inner tuple."""

NO_PIXELS = np.empty((0, 0, 3), np.uint8)

FIXED_COST_ROWS = 512
"""Cost of a micro-batch on top of its rows, in rows: kernels that are not full, and the summing of gradients."""

UNEVENNESS = 64
"""A full micro-batch costs an extra 1/64 of its rows, and a smaller one less than proportionally. So a few more rows in
total are preferred to one micro-batch that is nearly empty while the others are full."""


@dataclass(frozen=True, eq=False)
class Share:
    """The part of a batch that one rank computes."""

    samples: tuple[TrainingSample, ...]
    index: tuple[int, ...]
    """For each of `samples`, its index in the batch."""
    passes: tuple[Members, ...]
    """The micro-batches, as indices into `samples`; an empty one computes `filler`."""
    filler: TrainingSample
    """A sample of two tokens."""
    filler_item: MMItem | None
    """The image that a micro-batch sends through the vision tower where other ranks wait there for this one. None where
    no rank waits."""
    tower_calls: tuple[int, ...]
    """For each pass, how often every rank runs the vision tower: as often as the rank whose images have the most forms
    (`vlmrl.models.vision_encoder.alike`). 0 where no rank waits."""


def divide(
    samples: Sequence[TrainingSample], packing: Packing, token_budget: int, *, ranks: int = 1, tower_waits: bool = False
) -> list[Share]:
    """Divide at least one sample into one share per rank; each sample is in exactly one share.

    `token_budget` is the largest number of rows of a micro-batch. `tower_waits`: a rank must run the vision tower in
    every pass as often as another rank does.
    """
    image_keys = ImageKeys()
    keys = [image_keys.keys(sample.token_ids, sample.placeholders) for sample in samples]
    copies: dict[bytes, list[int]] = {}
    for index, key in enumerate(keys):
        copies.setdefault(sort_key(key), []).append(index)
    if packing is Packing.tree:
        distinct = [copies[key] for key in sorted(copies)]
    else:
        distinct = [[index] for key in sorted(copies) for index in copies[key]]
    lengths = [len(keys[members[0]]) for members in distinct]
    shared = [0] * len(distinct)
    if packing is Packing.tree:
        for place in range(1, len(distinct)):
            shared[place] = common_prefix(keys[distinct[place - 1][0]], keys[distinct[place][0]])
    budget = 1 if packing is Packing.none else token_budget
    runs = [range(*bounds) for bounds in cut_for_ranks(lengths, shared, budget, ranks)]
    rows = [lengths[run[0]] + sum(lengths[i] - shared[i] for i in run[1:]) for run in runs]
    filler = _filler(samples)
    items = [item for sample in samples for item in sample.mm_items]
    filler_item = min(items, key=lambda item: item.num_tokens) if tower_waits and items else None
    dealt_to_ranks = deal(rows, ranks)
    calls = [_tower_calls([samples[distinct[place][0]] for place in run]) if tower_waits else 0 for run in runs]
    tower_calls = tuple(
        max(calls[number] for number in numbers if number is not None) for numbers in zip(*dealt_to_ranks, strict=True)
    )
    shares = []
    for dealt in dealt_to_ranks:
        passes = [[] if number is None else [distinct[place] for place in runs[number]] for number in dealt]
        chosen = sorted(i for micro_batch in passes for members in micro_batch for i in members)
        local = {i: place for place, i in enumerate(chosen)}
        shares.append(
            Share(
                samples=tuple(samples[i] for i in chosen),
                index=tuple(chosen),
                passes=tuple(
                    tuple(tuple(local[i] for i in members) for members in micro_batch) for micro_batch in passes
                ),
                filler=filler,
                filler_item=filler_item,
                tower_calls=tower_calls,
            )
        )
    return shares


def without_pictures(share: Share) -> Share:
    """The share as it is sent to another rank, without the pictures for people (`ImageItem.pixels`,
    `VideoItem.frames`), which only rank 0 shows. An item that several samples share stays one object, so it is sent
    once."""
    items: dict[int, MMItem] = {}

    def light(item: MMItem) -> MMItem:
        if id(item) not in items:
            if isinstance(item, ImageItem):
                items[id(item)] = replace(item, pixels=NO_PIXELS)
            else:
                items[id(item)] = replace(item, frames=NO_PIXELS[None])
        return items[id(item)]

    return replace(
        share,
        samples=tuple(replace(s, mm_items=tuple(map(light, s.mm_items))) for s in share.samples),
        filler_item=None if share.filler_item is None else light(share.filler_item),
    )


def _tower_calls(samples: Sequence[TrainingSample]) -> int:
    """How often the vision tower runs for a micro-batch of `samples`."""
    return len(alike(list({item.hash: item for sample in samples for item in sample.mm_items}.values())))


def _filler(samples: Sequence[TrainingSample]) -> TrainingSample:
    """Two copies of a token that the policy may sample; a banned one would have probability 0."""
    learned = next((sample for sample in samples if sample.loss_mask.any()), samples[0])
    token = learned.token_ids[learned.loss_mask.argmax()]
    return TrainingSample(
        rollout_id="",
        token_ids=np.array([token, token], np.int64),
        mm_token_type_ids=np.zeros(2, np.int64),
        loss_mask=np.array([False, True]),
        advantages=np.zeros(2, np.float32),
        inference_logprobs=np.zeros(2, np.float32),
        versions=np.array([-1, 0], np.int64),
        placeholders=(),
        mm_items=(),
    )


# ── cutting and dealing ─────────────────────────────────────────────────────────────────────────────────────


def cut(lengths: Sequence[int], shared: Sequence[int], token_budget: int) -> list[tuple[int, int]]:
    """Divide a row of sequences into micro-batches → (start, end) of each, in order.

    Sequence i has `lengths[i]` tokens; the first `shared[i]` of them are already computed if the sequence before it is
    in the same micro-batch. No micro-batch exceeds `token_budget` tokens, except one that holds a single sequence.
    The result minimizes Σ (tokens + FIXED_COST_ROWS + tokens² / (UNEVENNESS · budget)) exactly, by dynamic programming
    over where the last micro-batch starts.

    Two groups of three sequences share 20 tokens of 22. With a budget of 30, each group is one micro-batch:

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
        # Tokens of [start, end) for every start. They only fall as the start moves right, so a start that is too far
        # back for this end is too far back for every later end.
        tokens = ends[end] - ends[first:end] + known[first:end]
        fits = tokens <= token_budget
        fits[-1] = True
        skipped = int(fits.argmax())
        first, tokens = first + skipped, tokens[skipped:]
        costs = best[first:end] + tokens + FIXED_COST_ROWS + tokens.astype(float) ** 2 / (UNEVENNESS * token_budget)
        begins[end] = first + int(costs.argmin())
        best[end] = costs.min()
    bounds = []
    end = count
    while end > 0:
        bounds.append((int(begins[end]), end))
        end = int(begins[end])
    return bounds[::-1]


def cut_for_ranks(
    lengths: Sequence[int], shared: Sequence[int], token_budget: int, ranks: int
) -> list[tuple[int, int]]:
    """Divide as `cut` does, so that `ranks` have about equal work: where possible the number of micro-batches is a
    multiple of `ranks`, and the largest one is as small as that number allows.

    >>> cut_for_ranks([5, 5, 5, 9], [0, 0, 0, 0], 100, ranks=2)
    [(0, 2), (2, 4)]
    """
    bounds = cut(lengths, shared, token_budget)
    if ranks == 1:
        return bounds
    wanted = -(-len(bounds) // ranks) * ranks
    low, high = 1, token_budget
    while low < high:
        middle = (low + high) // 2
        if len(cut(lengths, shared, middle)) <= wanted:
            high = middle
        else:
            low = middle + 1
    return cut(lengths, shared, high)


def deal(rows: Sequence[int], ranks: int) -> list[list[int | None]]:
    """Assign micro-batches to ranks → per rank, and per pass, an index into `rows` or None for a filler.

    Micro-batches of about the same size are computed in the same pass, since the ranks wait for each other in every
    pass. The order of the ranks is reversed from pass to pass, so that a rank that had the largest micro-batch in one
    pass has the smallest in the next.

    >>> deal([4, 9, 5, 8, 3], ranks=2)
    [[1, 0, 4], [3, 2, None]]
    """
    order = list(range(len(rows)))
    if ranks > 1:
        order.sort(key=lambda index: -rows[index])
    places: list[int | None] = [*order, *[None] * (-len(order) % ranks)]
    passes = [places[first : first + ranks] for first in range(0, len(places), ranks)]
    return [
        [each[rank if number % 2 == 0 else -1 - rank] for number, each in enumerate(passes)] for rank in range(ranks)
    ]
