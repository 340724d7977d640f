"""Samples → micro-batches. The only place that knows how samples share a forward pass.

    tree     each distinct prefix token once per micro-batch (vlmrl.models.attention.prefix_tree)
    varlen   samples side by side, nothing shared; the same rows and attention plan with sharing turned off
    none     one sample per micro-batch; the reference

    samples ─▶ shares.py: which samples form a micro-batch ─▶ here: rows, positions, images, loss tokens ─▶ MicroBatch

Samples with equal tokens and images become one set of rows, while the loss still counts each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from vlmrl.config.trainer import Packing
from vlmrl.models.attention.fused import Kernel
from vlmrl.models.attention.plan import TreePlan, make_plan
from vlmrl.models.attention.prefix_tree import ImageKeys, PrefixTree, Segment, build_tree, image_ends
from vlmrl.models.attention.rules import CAUSAL, AttentionRules
from vlmrl.models.families.positions import PositionFunction
from vlmrl.models.features import to_device
from vlmrl.models.supports import PackedSupports
from vlmrl.models.vision_encoder import alike
from vlmrl.trainer.shares import Share, divide
from vlmrl.types import FloatArray, IntArray, MMItem, Placeholder, Supports, TokenMetrics, TopTokens, TrainingSample


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """One forward/backward. T packed rows, U rows with a loss, N loss tokens (N ≥ U where samples coincide)."""

    token_ids: Tensor
    """int64 [T]."""
    position_ids: Tensor
    """int64 [4, T]; each row's position in its own sample: text, then MRoPE time, height, width."""
    mm_token_type_ids: Tensor
    """int64 [T]; 0 text, 1 image, 2 video."""
    mm_items: tuple[MMItem, ...]
    """Each distinct image and video once."""
    feature_rows: Tensor
    """int64 [placeholder rows]; for each placeholder row, in row order, the index of its image feature."""
    plan: TreePlan
    loss_rows: Tensor
    """int64 [U]; rows whose hidden state predicts a loss token (the row before that token). A row whose tokens were
    sampled at several temperatures stands here once for each."""
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
    temperatures: Tensor | None = None
    """float32 [U]; the temperature that a row's tokens were sampled at, NaN for the run's. None: the run's for all."""
    reference_logprobs: Tensor | None = None
    """float32 [N]; natural log of the reference's probability. None: not scored by a reference."""
    old_logprobs: Tensor | None = None
    """float32 [N]; natural log of the probability under the weights before the batch. None: not recorded."""
    old_values: Tensor | None = None
    """float32 [N]; the value before the token, under the weights before the batch. None: no value is learned."""
    returns: Tensor | None = None
    """float32 [N]; what that value is to be. None: no value is learned."""
    reference_top_ids: Tensor | None = None
    """int64 [U, k]; the tokens that the reference finds most likely after the row. None: not asked for."""
    reference_top_logprobs: Tensor | None = None
    """float32 [U, k + 1]; natural log of its probabilities of these tokens, and of all others together."""
    supports: PackedSupports | None = None
    """From which tokens the loss tokens were sampled. None: all from the whole vocabulary."""
    is_filler: bool = False
    """The micro-batch only keeps this rank in step with the others; its loss counts as zero."""
    idle_items: tuple[MMItem, ...] = ()
    """Where another rank's micro-batch runs the vision tower more often: each of these images is sent through the tower
    on its own, and the features are not used."""


def pack(
    samples: Sequence[TrainingSample],
    packing: Packing,
    token_budget: int,
    positions: PositionFunction,
    device: torch.device,
    *,
    kernel: Kernel = Kernel.blocks,
    rules: AttentionRules = CAUSAL,
) -> list[MicroBatch]:
    """Micro-batches that hold each loss token of `samples` exactly once, planned for attention by `kernel` in layers
    that follow `rules`."""
    return list(pack_share(divide(samples, packing, token_budget)[0], packing, positions, device, kernel, rules))


def pack_share(
    share: Share,
    packing: Packing,
    positions: PositionFunction,
    device: torch.device,
    kernel: Kernel,
    rules: AttentionRules,
) -> Iterator[MicroBatch]:
    """The micro-batches of one rank, each packed when it is asked for, so that packing overlaps with the GPU's work."""
    for members, tower_calls in zip(share.passes, share.tower_calls, strict=True):
        samples, packed = (share.samples, members) if members else ([share.filler], [[0]])
        batch = _micro_batch(samples, packed, packing, positions, device, kernel, rules)
        missing = max(0, tower_calls - len(alike(batch.mm_items)))
        idle = () if share.filler_item is None else missing * (share.filler_item,)
        yield replace(batch, is_filler=not members, idle_items=idle)


@dataclass(frozen=True, eq=False)
class _SampleLoss:
    """The loss tokens of one sample, n of them."""

    sample: TrainingSample
    index: int
    """Index of the sample in the share."""
    where: IntArray
    """int64 [n]; the positions of the loss tokens in the sample."""
    rows: IntArray
    """int64 [n]; the rows that predict them."""

    @staticmethod
    def of(sample: TrainingSample, index: int, rows: IntArray) -> _SampleLoss:
        """`rows`: int64 [L], the row of each of the sample's tokens."""
        where = np.flatnonzero(sample.loss_mask)
        assert not len(where) or where[0] > 0, "no row predicts the first token, so it cannot have a loss"
        return _SampleLoss(sample, index, where, rows[where - 1])


def _micro_batch(
    samples: Sequence[TrainingSample],
    members: Sequence[Sequence[int]],
    packing: Packing,
    positions: PositionFunction,
    device: torch.device,
    kernel: Kernel,
    rules: AttentionRules,
) -> MicroBatch:
    """Pack the samples that `members` names; those of one inner sequence are equal and share all rows."""
    image_keys = ImageKeys()
    distinct = [samples[first] for first, *_ in members]
    keys = [image_keys.keys(sample.token_ids, sample.placeholders) for sample in distinct]
    tree = build_tree(keys, share=packing is Packing.tree)
    token_ids, position_ids, mm_token_type_ids = _row_contents(distinct, tree, positions)
    mm_items, feature_rows = _features(distinct, tree)
    losses = [
        _SampleLoss.of(samples[index], index, rows)
        for equal, rows in zip(members, tree.rows, strict=True)
        for index in equal
    ]
    loss_rows, entry, temperatures = _loss_rows(losses)

    def tensor(array: np.ndarray) -> Tensor:
        return to_device(array, device)

    is_scored = all(loss.sample.reference_logprobs is not None for loss in losses)
    before = [loss.sample.before for loss in losses if loss.sample.before is not None]
    recorded = TokenMetrics.joined(before) if len(before) == len(losses) else None
    old_values = None if recorded is None else recorded.values
    has_returns = all(loss.sample.returns is not None for loss in losses)

    def gather(values: Callable[[TrainingSample], np.ndarray]) -> Tensor:
        return tensor(np.concatenate([values(loss.sample)[loss.where] for loss in losses]))

    top_ids, top_logprobs = _reference_top(losses, entry) or (None, None)
    targets = np.concatenate([loss.sample.token_ids[loss.where] for loss in losses])
    return MicroBatch(
        token_ids=tensor(token_ids),
        position_ids=tensor(position_ids),
        mm_token_type_ids=tensor(mm_token_type_ids),
        mm_items=mm_items,
        feature_rows=tensor(feature_rows),
        plan=make_plan(kernel, _segments(tree, mm_token_type_ids, rules), device, rules),
        loss_rows=tensor(loss_rows),
        temperatures=None if temperatures is None else tensor(temperatures),
        entry=tensor(entry),
        targets=tensor(targets),
        inference_logprobs=gather(lambda sample: sample.inference_logprobs),
        advantages=gather(lambda sample: sample.advantages),
        versions=gather(lambda sample: sample.versions),
        reference_logprobs=gather(_reference_logprobs) if is_scored else None,
        old_logprobs=None if recorded is None else tensor(recorded.trainer_logprobs),
        old_values=None if old_values is None else tensor(old_values),
        returns=gather(_returns) if has_returns else None,
        reference_top_ids=None if top_ids is None else tensor(top_ids),
        reference_top_logprobs=None if top_logprobs is None else tensor(top_logprobs),
        supports=_packed_supports(losses, targets, device),
        sample_index=tensor(np.concatenate([np.full(len(loss.where), loss.index) for loss in losses])),
    )


def _segments(tree: PrefixTree, mm_token_type_ids: np.ndarray, rules: AttentionRules) -> list[Segment]:
    """The segments of `tree`, each with its own rows as keys."""
    segments = []
    for parent, start, end in tree.segments:
        rows = np.arange(start, end)
        ends = image_ends(mm_token_type_ids[start:end]) if rules.image_runs else None
        segments.append(Segment(parent, slots=rows, rows=rows, image_ends=ends))
    return segments


def _reference_logprobs(sample: TrainingSample) -> FloatArray:
    assert sample.reference_logprobs is not None
    return sample.reference_logprobs


def _returns(sample: TrainingSample) -> FloatArray:
    assert sample.returns is not None
    return sample.returns


def _reference_top(losses: Sequence[_SampleLoss], entry: IntArray) -> tuple[IntArray, FloatArray] | None:
    """`reference_top_ids` and `reference_top_logprobs` of a micro-batch. Samples that share a row have the same, so
    each row takes those of the first."""
    tops = [loss.sample.reference_top for loss in losses if loss.sample.reference_top is not None]
    if len(tops) < len(losses):
        return None
    _, first = np.unique(entry, return_index=True)
    joined = TopTokens.joined(tops)
    return joined.ids[first].astype(np.int64), joined.logprobs[first]


def _loss_rows(losses: Sequence[_SampleLoss]) -> tuple[IntArray, IntArray, FloatArray | None]:
    """`loss_rows`, `entry` and `temperatures` of a micro-batch."""
    rows = np.concatenate([loss.rows for loss in losses])
    if all(loss.sample.temperatures is None for loss in losses):
        return *np.unique(rows, return_inverse=True), None
    given = np.concatenate([_temperatures(loss) for loss in losses])
    own, which = np.unique(given, return_inverse=True)  # all NaN count as equal
    pairs, entry = np.unique(rows * len(own) + which, return_inverse=True)
    return pairs // len(own), entry, own[pairs % len(own)]


def _temperatures(loss: _SampleLoss) -> FloatArray:
    """float32 [n]; of the loss tokens, NaN for the run's temperature."""
    given = loss.sample.temperatures
    return np.full(len(loss.where), np.nan, np.float32) if given is None else given[loss.where]


def _packed_supports(losses: Sequence[_SampleLoss], targets: IntArray, device: torch.device) -> PackedSupports | None:
    """The supports of the N loss tokens, which sampled `targets`."""
    if all(loss.sample.supports is None for loss in losses):
        return None
    return PackedSupports.of(Supports.joined(map(_supports, losses)), targets, device)


def _supports(loss: _SampleLoss) -> Supports:
    """Of the n loss tokens."""
    supports = loss.sample.supports
    return Supports.of([()] * len(loss.where)) if supports is None else supports.take(loss.where)


def _row_contents(
    samples: Sequence[TrainingSample], tree: PrefixTree, positions: PositionFunction
) -> tuple[IntArray, IntArray, IntArray]:
    """token_ids int64 [T], position_ids int64 [4, T] and mm_token_type_ids int64 [T] of the rows of `tree`."""
    token_ids = np.empty(tree.num_rows, np.int64)
    position_ids = np.empty((4, tree.num_rows), np.int64)
    mm_token_type_ids = np.empty(tree.num_rows, np.int64)
    known: dict[tuple[int, tuple[Placeholder, ...]], IntArray] = {}
    """Length and placeholders → positions. Sibling rollouts often have the same."""
    for sample, rows, new_from in zip(samples, tree.rows, tree.new_from, strict=True):
        added = rows[new_from:]
        token_ids[added] = sample.token_ids[new_from:]
        mm_token_type_ids[added] = sample.mm_token_type_ids[new_from:]
        shape = len(sample.token_ids), sample.placeholders
        if shape not in known:
            known[shape] = positions(len(sample.token_ids), sample.placeholders, sample.mm_items)
        # A position depends on the prefix alone, so shared rows have the same positions in every sample.
        position_ids[:, added] = known[shape][:, new_from:]
    return token_ids, position_ids, mm_token_type_ids


def _features(samples: Sequence[TrainingSample], tree: PrefixTree) -> tuple[tuple[MMItem, ...], IntArray]:
    """Each distinct image and video once, and for each placeholder row, in row order, the index of its feature (int64)
    where the features of all these items stand one after another."""
    items: dict[str, MMItem] = {}
    shown: dict[int, MMItem] = {}
    """First row of a placeholder → its item."""
    for sample, rows in zip(samples, tree.rows, strict=True):
        for placeholder, item in zip(sample.placeholders, sample.mm_items, strict=True):
            items.setdefault(item.hash, item)
            shown.setdefault(int(rows[placeholder.offset]), items[item.hash])
    first_feature, total = {}, 0
    for item in items.values():
        first_feature[item.hash] = total
        total += item.num_tokens
    feature_rows = [
        np.arange(first_feature[item.hash], first_feature[item.hash] + item.num_tokens)
        for _, item in sorted(shown.items(), key=lambda pair: pair[0])
    ]
    return tuple(items.values()), np.concatenate([np.empty(0, np.int64), *feature_rows])
