"""A batch, divided: which samples each rank computes, in which micro-batches.

Samples are sorted by their tokens, so that neighbours share the longest prefixes, and cut into runs (balance.py). Every
rank has the same number of passes, since in each of them the weights of a sharded model are gathered from all; a pass
that has nothing to learn computes a few tokens and counts for nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vlmrl.config.trainer import Packing
from vlmrl.models.attention.prefix_tree import ImageKeys, common_prefix, sort_key
from vlmrl.trainer.balance import cut_for_ranks, deal
from vlmrl.types import ImageItem, TrainingSample

Groups = tuple[tuple[int, ...], ...]
"""The samples of a micro-batch, sorted; equal ones, which stand in the same rows, together."""

NO_PIXELS = np.empty((0, 0, 3), np.uint8)


@dataclass(frozen=True, eq=False)
class Share:
    """What one rank computes of a batch."""

    samples: tuple[TrainingSample, ...]
    index: tuple[int, ...]
    """Of each of `samples`, its place in the batch."""
    passes: tuple[Groups, ...]
    """Indices into `samples`; an empty pass computes `filler`."""
    filler: TrainingSample
    """Two tokens."""
    filler_image: ImageItem | None
    """What a pass without images runs through the vision tower, whose weights other ranks wait for; None where none of
    them does."""


def divide(
    samples: Sequence[TrainingSample], packing: Packing, token_budget: int, *, ranks: int = 1, tower_waits: bool = False
) -> list[Share]:
    """The share of each rank; together they hold each of `samples`, of which there is one at least, once.

    `tower_waits` says that a pass without images must run the vision tower all the same, if another has some.
    """
    image_keys = ImageKeys()
    keys = [image_keys.keys(sample.token_ids, sample.placeholders) for sample in samples]
    members: dict[bytes, list[int]] = {}
    for index, key in enumerate(keys):
        members.setdefault(sort_key(key), []).append(index)
    if packing is Packing.tree:
        distinct = [members[key] for key in sorted(members)]
    else:
        distinct = [[index] for key in sorted(members) for index in members[key]]
    lengths = [len(keys[group[0]]) for group in distinct]
    shared = [0] * len(distinct)
    if packing is Packing.tree:
        for place in range(1, len(distinct)):
            shared[place] = common_prefix(keys[distinct[place - 1][0]], keys[distinct[place][0]])
    budget = 1 if packing is Packing.none else token_budget
    runs = [range(*bounds) for bounds in cut_for_ranks(lengths, shared, budget, ranks)]
    rows = [lengths[run[0]] + sum(lengths[i] - shared[i] for i in run[1:]) for run in runs]
    filler = _filler(samples)
    images = [image for sample in samples for image in sample.images]
    filler_image = min(images, key=lambda image: image.num_tokens) if tower_waits and images else None
    shares = []
    for passes in deal(rows, ranks):
        mine = [[] if number is None else [distinct[place] for place in runs[number]] for number in passes]
        """Of each pass, the groups of equal samples, by their places in the batch."""
        chosen = sorted(i for groups in mine for group in groups for i in group)
        local = {i: place for place, i in enumerate(chosen)}
        shares.append(
            Share(
                samples=tuple(samples[i] for i in chosen),
                index=tuple(chosen),
                passes=tuple(tuple(tuple(local[i] for i in group) for group in groups) for groups in mine),
                filler=filler,
                filler_image=filler_image,
            )
        )
    return shares


def without_pictures(share: Share) -> Share:
    """The share as it travels: no rank but 0 shows images to people. What samples had in common they still have."""
    images: dict[int, ImageItem] = {}

    def light(image: ImageItem) -> ImageItem:
        return images.setdefault(id(image), dataclasses.replace(image, pixels=NO_PIXELS))

    return dataclasses.replace(
        share,
        samples=tuple(dataclasses.replace(s, images=tuple(map(light, s.images))) for s in share.samples),
        filler_image=None if share.filler_image is None else light(share.filler_image),
    )


def _filler(samples: Sequence[TrainingSample]) -> TrainingSample:
    """A token that the policy may sample, twice."""
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
        images=(),
    )
