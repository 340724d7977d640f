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
from vlmrl.trainer.cutting import cut_for_ranks, deal
from vlmrl.types import MMItem, TrainingSample

Members = tuple[tuple[int, ...], ...]
"""The samples of one micro-batch, as indices in sorted order. Samples with equal tokens and images, which are computed
only once, are in one inner tuple."""


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
            items[id(item)] = item.without_picture()
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
