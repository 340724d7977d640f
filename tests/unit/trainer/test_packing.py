"""Packing loses and doubles nothing, each row sees only its own sample's prefix, and results equal one by one."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from support.helpers import IMAGE_PAD, Part, Sampled, blocks_of, image, plain_logprobs, sample, seen
from vlmrl.config.trainer import Packing
from vlmrl.models.attention import plan as tree_plan
from vlmrl.models.families.positions import position_function
from vlmrl.models.policy import Policy
from vlmrl.trainer.cutting import FIXED_COST_ROWS, UNEVENNESS, cut
from vlmrl.trainer.packing import MicroBatch, pack
from vlmrl.types import TrainingSample, mm_token_type_ids

CPU = torch.device("cpu")
positions = position_function("mrope", 2)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


# ── what is in the micro-batches ────────────────────────────────────────────────────────────────────────────

IMAGES = [image(1, 1), image(2, 1), image(2, 3), image(1, 1, seed=1)]
texts = st.lists(st.integers(0, 2), max_size=3)
# A policy may sample an image token. It belongs to no image, and must not be treated as a placeholder.
completions = st.lists(st.integers(0, 2) | st.just(IMAGE_PAD), min_size=1, max_size=3).map(Sampled)
turns = st.tuples(st.lists(texts | st.sampled_from(IMAGES), max_size=3), completions).map(lambda t: [*t[0], t[1]])
conversations: st.SearchStrategy[list[Part]] = st.lists(turns, min_size=1, max_size=3).map(
    lambda turns: [7, *(part for turn in turns for part in turn)]
)


@st.composite
def batches(draw: st.DrawFn) -> list[TrainingSample]:
    """Up to 8 samples from a tiny alphabet, so that prefixes, images and whole samples coincide; some occur twice."""
    drawn = draw(st.lists(conversations, min_size=1, max_size=6))
    drawn += draw(st.lists(st.sampled_from(drawn), max_size=2))
    return [sample(str(i), *parts, seed=i) for i, parts in enumerate(drawn)]


def num_rows(batch: MicroBatch) -> int:
    return len(batch.token_ids)


@settings(max_examples=60)
@given(batches(), st.sampled_from(Packing), st.integers(1, 60))
def test_no_loss_token_is_lost_or_doubled_and_each_keeps_its_values(
    samples: list[TrainingSample], packing: Packing, budget: int
) -> None:
    found: Counter[int] = Counter()
    for batch in pack(samples, packing, budget, positions, CPU):
        for index in batch.sample_index.unique().tolist():  # type: ignore[no-untyped-call]
            found[index] += 1
            mine = batch.sample_index == index
            for name, values in (
                ("token_ids", batch.targets),
                ("advantages", batch.advantages),
                ("inference_logprobs", batch.inference_logprobs),
                ("versions", batch.versions),
            ):
                wanted = getattr(samples[index], name)[samples[index].loss_mask]
                np.testing.assert_array_equal(values[mine].numpy(), wanted)
                assert values.numpy().dtype == wanted.dtype
    assert found == Counter(range(len(samples))), "each sample is in one micro-batch"


BREAK = 3


def with_breaks(sample: TrainingSample) -> TrainingSample:
    """The same sample with a break between every two image tokens of an image: placeholders with gaps."""
    inside = [p.offset + k for p in sample.placeholders for k in range(1, p.length)]
    placeholders, added = [], 0
    for place in sample.placeholders:
        breaks = place.length - 1
        gaps = tuple((2 * k + 1, 1) for k in range(breaks))
        placeholders.append(replace(place, offset=place.offset + added, length=place.length + breaks, gaps=gaps))
        added += breaks
    fillers = {"token_ids": BREAK, "loss_mask": False, "advantages": 0, "inference_logprobs": 0, "versions": -1}
    arrays: dict[str, Any] = {
        name: np.insert(getattr(sample, name), inside, filler) for name, filler in fillers.items()
    }
    types = mm_token_type_ids(len(arrays["token_ids"]), tuple(placeholders))
    return replace(sample, **arrays, mm_token_type_ids=types, placeholders=tuple(placeholders))


@pytest.mark.parametrize("breaks", [False, True])
@settings(max_examples=60)
@given(batches(), st.sampled_from(Packing), st.integers(1, 60), st.sampled_from([1, 20, 16384]))
def test_each_loss_is_predicted_from_its_own_sample_s_prefix_and_nothing_else(
    breaks: bool, samples: list[TrainingSample], packing: Packing, budget: int, threshold: int
) -> None:
    positions = position_function("sequential" if breaks else "mrope", 2)
    samples = [with_breaks(each) for each in samples] if breaks else samples
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tree_plan, "MIN_SHARED_PAIRS", threshold)
        packed = pack(samples, packing, budget, positions, CPU)
    for batch in packed:
        sight = seen(batch.plan, num_rows(batch), num_rows(batch))
        features = features_by_row(batch)
        row_of_loss = batch.loss_rows[batch.entry].numpy()
        assert len(set(batch.loss_rows.tolist())) == len(batch.loss_rows)
        where = {i: iter(np.flatnonzero(s.loss_mask)) for i, s in enumerate(samples)}
        for row, index in zip(row_of_loss, batch.sample_index.tolist(), strict=True):
            own, end = samples[index], int(next(where[index]))
            assert set(sight[row].tolist()) <= {0, 1}
            path = np.flatnonzero(sight[row])
            path = path[np.argsort(batch.position_ids[0, path].numpy())]
            np.testing.assert_array_equal(batch.token_ids[path].numpy(), own.token_ids[:end])
            np.testing.assert_array_equal(batch.mm_token_type_ids[path].numpy(), own.mm_token_type_ids[:end])
            np.testing.assert_array_equal(
                batch.position_ids[:, path].numpy(),
                positions(len(own.token_ids), own.placeholders, own.images)[:, :end],
            )
            shown = [(p.hash, k) for p in own.placeholders if p.offset < end for k in range(p.num_features)]
            assert [features[r] for r in path.tolist() if r in features] == shown


def features_by_row(batch: MicroBatch) -> dict[int, tuple[str, int]]:
    """Placeholder row → (image, index of its feature). The features of `batch.mm_items` follow one another."""
    feature = [(item.hash, k) for item in batch.mm_items for k in range(item.num_tokens)]
    rows = np.flatnonzero(batch.mm_token_type_ids.numpy())
    return {int(row): feature[f] for row, f in zip(rows, batch.feature_rows.tolist(), strict=True)}


@settings(max_examples=60)
@given(batches(), st.sampled_from(Packing), st.integers(1, 60))
def test_no_image_is_lost_or_doubled_and_the_budget_holds(
    samples: list[TrainingSample], packing: Packing, budget: int
) -> None:
    packed = pack(samples, packing, budget, positions, CPU)
    for batch in packed:
        members = [samples[i] for i in sorted(set(batch.sample_index.tolist()))]
        assert sorted(item.hash for item in batch.mm_items) == sorted({p.hash for s in members for p in s.placeholders})
        lengths = [len(member.token_ids) for member in members]
        distinct = {identity(member) for member in members}
        if packing is Packing.tree:
            assert num_rows(batch) == len({whole[:n] for whole in distinct for n in range(1, len(whole) + 1)})
            assert num_rows(batch) <= budget or len(distinct) == 1
        else:
            assert num_rows(batch) == sum(lengths)
            assert num_rows(batch) <= budget or len(members) == 1
        assert packing is not Packing.none or len(members) == 1
    if packing is Packing.tree and budget == 60 and len({identity(s) for s in samples}) == 1:
        assert len(packed) == 1


def identity(sample: TrainingSample) -> tuple[object, ...]:
    """The token ids of a sample, with the image's hash in place of each placeholder token."""
    ids: list[object] = sample.token_ids.tolist()
    for p in sample.placeholders:
        ids[p.offset : p.offset + p.length] = [p.hash] * p.length
    return tuple(ids)


def test_micro_batches_are_as_few_as_the_budget_allows_and_even() -> None:
    """Ten samples share 20 of 22 tokens. With a budget of 26, a micro-batch holds at most 22 + 2 + 2 rows."""
    samples = [sample(str(i), list(range(20)), Sampled([100 + i, 7])) for i in range(10)]
    assert [num_rows(b) for b in pack(samples, Packing.tree, 26, positions, CPU)] == [24, 24, 26, 26]
    assert [num_rows(b) for b in pack(samples, Packing.tree, 40, positions, CPU)] == [40]
    assert [num_rows(b) for b in pack(samples, Packing.varlen, 50, positions, CPU)] == [44] * 5
    assert [num_rows(b) for b in pack(samples, Packing.none, 50, positions, CPU)] == [22] * 10


def test_whole_trees_stay_together_where_they_fit() -> None:
    """Four groups of three samples share 20 of 22 tokens, so each takes 26 rows; the budget exceeds two groups."""
    samples = [sample(f"{g}{i}", [g] * 20, Sampled([100 + i, 7])) for g in range(4) for i in range(3)]
    for budget, wanted in ((40, [26, 26, 26, 26]), (78, [52, 52])):
        packed = pack(samples, Packing.tree, budget, positions, CPU)
        assert [num_rows(b) for b in packed] == wanted
        for batch in packed:
            assert {samples[i].rollout_id[0] for i in batch.sample_index.tolist()} == {
                str(t) for t in set(batch.token_ids.tolist()) if t < 4
            }


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=8),
    st.integers(1, 40),
)
def test_no_other_cut_costs_less(row: list[tuple[int, int]], budget: int) -> None:
    lengths = [length for length, _ in row]
    shared = [0] + [min(a[0], b[0] - 1, b[1]) for a, b in pairwise(row)]

    def cost(bounds: list[tuple[int, int]]) -> float:
        tokens = [sum(lengths[a:b]) - sum(shared[a + 1 : b]) for a, b in bounds]
        if any(n > budget and b - a > 1 for n, (a, b) in zip(tokens, bounds, strict=True)):
            return np.inf
        return sum(n + FIXED_COST_ROWS + n**2 / (UNEVENNESS * budget) for n in tokens)

    every = [
        list(pairwise([0, *ends, len(row)]))
        for n in range(len(row))
        for ends in itertools.combinations(range(1, len(row)), n)
    ]
    found = cut(lengths, shared, budget)
    assert found in every
    assert cost(found) == pytest.approx(min(map(cost, every)))


# ── the numbers of packed micro-batches ─────────────────────────────────────────────────────────────────────


def conversations_of_two_groups() -> list[TrainingSample]:
    """A batch with everything that packing must handle.

    Images of several shapes, one of them twice in a sample and in both groups; branches that fork inside a completion,
    at its end and at the reply's image; a sample twice; one that is the beginning of others; some without any image.
    """
    random = np.random.default_rng(0)
    system = random.integers(0, 256, 30).tolist()
    rectangle, tall, square = image(2, 3), image(3, 1), image(1, 1)
    samples: list[TrainingSample] = []

    def add(*parts: Part) -> None:
        samples.append(sample(f"{len(samples)}", system, *parts, seed=len(samples)))

    for group, first in enumerate((rectangle, image(4, 2))):
        opening: list[Part] = [[1, group], first, [2, 3], square, 4]
        add(*opening, Sampled([10, 11, 12]))
        for last in ([11, 12], [11, 13], [14, 12]):
            add(*opening, Sampled([10, *last]), [5, 6], tall, rectangle, 4, Sampled([20 + last[0], last[1]]))
        add(*opening, Sampled([10, 11, 12]), [5, 6], tall, rectangle, 4, Sampled([31, 12, 33, 34]))
        add(*opening, Sampled([10, 11, 12]), [5, 6], square, rectangle, 4, Sampled([31, 12, 33, 34]))
        add(*opening, Sampled([10, 11, 12]), [5, 6], tall, rectangle, 4, Sampled([31, 12, 33, 34]))
    add([8, 9], Sampled([10, 11]))
    add([8, 9], Sampled([10, 12]), [5], Sampled([13]))
    return samples


@dataclass(frozen=True)
class Numbers:
    logprobs: list[Tensor]
    """Per sample, float32 [loss tokens of the sample]."""
    gradients: dict[str, Tensor]
    """Gradients of Σ advantage · logprob over all loss tokens, by parameter."""


@pytest.fixture(scope="module")
def samples() -> list[TrainingSample]:
    return conversations_of_two_groups()


@pytest.fixture(scope="module")
def one_by_one(loaded_tiny_model: Any, samples: list[TrainingSample]) -> Numbers:
    """Plain transformers, one sample at a time: sdpa attention, its own positions, pixels as `pixel_values`."""
    assert loaded_tiny_model.config.get_text_config()._attn_implementation == "sdpa"
    loaded_tiny_model.zero_grad()
    logprobs = [plain_logprobs(loaded_tiny_model, s) for s in samples]
    advantages = torch.cat([torch.from_numpy(s.advantages[s.loss_mask]) for s in samples])
    (torch.cat(logprobs) * advantages).sum().backward()  # type: ignore[no-untyped-call]
    gradients = gradients_of(loaded_tiny_model)
    loaded_tiny_model.zero_grad()
    return Numbers([x.detach() for x in logprobs], gradients)


def gradients_of(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def packed_numbers(policy: Policy, samples: list[TrainingSample], packed: list[MicroBatch]) -> Numbers:
    logprobs = [torch.empty(0)] * len(samples)
    for batch in packed:
        features = policy.encode_items(batch.mm_items)
        hidden = policy.hidden_states(
            batch.token_ids, batch.position_ids, batch.mm_token_type_ids, batch.plan, features, batch.feature_rows
        )
        found = policy.log_probs(hidden[batch.loss_rows], 1.0)[batch.entry, batch.targets]
        (found * batch.advantages).sum().backward()  # type: ignore[no-untyped-call]
        for index in batch.sample_index.unique().tolist():  # type: ignore[no-untyped-call]
            logprobs[index] = found.detach()[batch.sample_index == index]
    return Numbers(logprobs, gradients_of(policy.model))


@pytest.mark.parametrize(
    ("packing", "budget", "threshold"),
    [
        (Packing.tree, 16384, 16384),
        (Packing.tree, 16384, 64),
        (Packing.tree, 150, 64),
        (Packing.varlen, 300, 64),
        (Packing.none, 1, 64),
    ],
)
def test_packed_logprobs_and_gradients_are_those_of_one_by_one(
    tiny_model: Callable[[], Any],
    samples: list[TrainingSample],
    one_by_one: Numbers,
    packing: Packing,
    budget: int,
    threshold: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tree_plan, "MIN_SHARED_PAIRS", threshold)
    policy = Policy(tiny_model(), positions, [])
    packed = pack(samples, packing, budget, positions, CPU)
    assert (len(packed) == 1) == (budget == 16384)
    assert any(blocks_of(batch.plan).shared for batch in packed) == (packing is Packing.tree and threshold == 64)
    found = packed_numbers(policy, samples, packed)
    for mine, theirs in zip(found.logprobs, one_by_one.logprobs, strict=True):
        assert mine.shape == theirs.shape
        assert float(((mine - theirs) / theirs).abs().max()) <= 1e-5
    assert (
        found.gradients.keys() == one_by_one.gradients.keys() == {name for name, _ in policy.model.named_parameters()}
    )
    for name, theirs in one_by_one.gradients.items():
        error = float((found.gradients[name] - theirs).norm() / theirs.norm())
        assert error <= 1e-5, f"gradient of {name}: relative error {error}"
