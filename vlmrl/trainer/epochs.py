"""Several optimizer steps on one batch: `algorithm.epochs` passes over it, each in `algorithm.minibatches` parts.

    batch ─▶ log π_old of every token, once ─▶ each pass: new random order ─▶ minibatches ─▶ one optimizer step each

The order depends on the run's seed, the policy version and the number of the pass, and on nothing else: it is the same
for every number of ranks and for a resumed run. Samples with the same first prompt, the siblings of a group, stay
together where there are at least as many prompts as minibatches. Then the prefix tree shares as much in a minibatch as
in the batch, and the advantages of a minibatch keep their mean.

Left out on purpose: resuming between two optimizer steps of a batch. A checkpoint is written between batches.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from vlmrl.config.algorithm import AlgorithmConfig
from vlmrl.types import TrainingSample


@dataclass(frozen=True)
class Part:
    """What one optimizer step learns from."""

    epoch: int
    """The pass over the batch, from 0."""
    samples: tuple[int, ...]
    """Indices into the batch, ascending; at least one."""
    demonstrations: tuple[int, ...]
    """Indices into the batch's demonstrations, ascending. Empty for some parts where there are fewer than parts."""
    is_last: bool
    """Whether it is the last optimizer step on the batch."""


def optimizer_steps(
    samples: Sequence[TrainingSample], demonstrations: int, algorithm: AlgorithmConfig, *, seed: int, version: int
) -> list[Part]:
    """The optimizer steps on a batch of at least one sample and of so many demonstrations, in order. A pass over fewer
    samples than `algorithm.minibatches` has one step per sample."""
    prompts = [first_prompt(sample) for sample in samples]
    count = min(algorithm.minibatches, len(samples))
    parts = []
    for epoch in range(algorithm.epochs):
        random = np.random.default_rng((seed, version, epoch))
        chosen = shuffled_parts(prompts, count, random)
        demonstrated = shuffled_parts(range(demonstrations), count, random)
        for number, (own, others) in enumerate(zip(chosen, demonstrated, strict=True), 1):
            is_last = epoch == algorithm.epochs - 1 and number == count
            parts.append(Part(epoch, tuple(own), tuple(others), is_last))
    return parts


def first_prompt(sample: TrainingSample) -> Hashable:
    """What the policy had seen before it sampled its first token of the sample: token ids and images."""
    length = int(sample.loss_mask.argmax())
    pairs = zip(sample.placeholders, sample.mm_items, strict=True)
    return sample.token_ids[:length].tobytes(), *(image.hash for where, image in pairs if where.offset < length)


def shuffled_parts(groups: Sequence[Hashable], count: int, random: np.random.Generator) -> list[list[int]]:
    """Divide items into `count` parts of about the same size, in a random order → their indices, ascending in a part.

    `groups` names the group of each item. A group is divided only where there are fewer groups than parts; a part is
    empty only where there are fewer items than parts.

    >>> shuffled_parts("aaabbbccc", 2, np.random.default_rng(0))
    [[6, 7, 8], [0, 1, 2, 3, 4, 5]]
    >>> [len(part) for part in shuffled_parts("aaabbbccc", 5, np.random.default_rng(0))]
    [2, 2, 1, 2, 2]
    """
    members: dict[Hashable, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    units = list(members.values())
    units = [units[place] for place in random.permutation(len(units))]
    if len(units) < count:
        units = [[int(index)] for unit in units for index in random.permutation(unit)]
    ends = np.cumsum([0, *map(len, units)])  # [units + 1]; items before each place at which a part may end
    parts, start = [], 0
    for number in range(1, count + 1):
        fewest = min(1, max(0, len(units) - start))
        last = max(start + fewest, len(units) - (count - number))
        wanted = len(groups) * number / count
        place = start + fewest + int(np.abs(ends[start + fewest : last + 1] - wanted).argmin())
        parts.append(sorted(index for unit in units[start:place] for index in unit))
        start = place
    return parts
