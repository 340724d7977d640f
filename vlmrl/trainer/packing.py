"""Samples → micro-batches. The only place that knows how samples share a forward pass.

    tree     each distinct prefix token once per micro-batch (vlmrl.models.attention.prefix_tree)
    varlen   samples side by side, nothing shared; the same rows and plan with sharing turned off
    none     one sample per micro-batch; the reference

Which samples go together is shares.py's to say: neighbours in the order of their tokens, as many as the token budget
takes. Equal samples collapse into one row each, while the loss still counts every one of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from vlmrl.config.trainer import Packing
from vlmrl.models.attention.fused import Kernel
from vlmrl.models.attention.prefix_tree import ImageKeys, Segment, build_tree
from vlmrl.models.attention.tree import TreePlan, make_plan
from vlmrl.models.families.positions import PositionFunction
from vlmrl.models.transfer import to_device
from vlmrl.trainer.shares import Share, divide
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
    """int64 [N]; index of the sample in the share."""
    is_filler: bool = False
    """Nothing of it is learned: it keeps a rank in step with the others."""
    idle_image: ImageItem | None = None
    """Goes through the vision tower for nothing, where this pass has no image and that of another rank may have one."""


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
    return list(pack_share(divide(samples, packing, token_budget)[0], packing, positions, device, kernel))


def pack_share(
    share: Share, packing: Packing, positions: PositionFunction, device: torch.device, kernel: Kernel
) -> Iterator[MicroBatch]:
    """The micro-batches of one rank, one per pass, each when it is asked for."""
    for groups in share.passes:
        samples, of = (share.samples, groups) if groups else ([share.filler], [[0]])
        image_keys = ImageKeys()
        keys = {i: image_keys.keys(samples[i].token_ids, samples[i].placeholders) for i, *_ in of}
        batch = _micro_batch(samples, keys, of, packing, positions, device, kernel)
        yield replace(batch, is_filler=not groups, idle_image=None if batch.images else share.filler_image)


def _micro_batch(
    samples: Sequence[TrainingSample],
    keys: Mapping[int, IntArray],
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
        return to_device(array, device)

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
