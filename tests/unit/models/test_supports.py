"""Logprobs over recorded supports: those of a softmax that knows no other token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlmrl.models import head
from vlmrl.models.logit_map import IDENTITY, LogitMap
from vlmrl.models.supports import PackedSupports, support_logprobs
from vlmrl.types import ContractError, FloatArray, Supports

CPU = torch.device("cpu")


def problem(seed: int, rows: int, tokens: int, vocabulary: int) -> Any:
    """hidden, weight, bias, entry int64 [N], targets int64 [N] and their supports. Tokens of one row differ in their
    supports; some are the sampled token alone, some the whole vocabulary written out."""
    random = np.random.default_rng(seed)
    hidden, weight = random.standard_normal((rows, 8)), random.standard_normal((vocabulary, 8))
    targets = random.integers(0, vocabulary, tokens)
    sizes = np.minimum(random.choice([0, 1, 2, 5, vocabulary - 1], tokens), vocabulary - 1)
    supports = [np.union1d(random.permutation(vocabulary)[:n], [t]) for n, t in zip(sizes, targets, strict=True)]
    floats = [
        torch.from_numpy(each.astype(np.float32)) for each in (hidden, weight, random.standard_normal(vocabulary))
    ]
    return (*floats, random.integers(0, rows, tokens), targets, Supports.of(supports))


def by_numpy(
    hidden: Tensor, weight: Tensor, bias: Tensor, entry: Any, targets: Any, supports: Supports, temperature: Any
) -> tuple[FloatArray, FloatArray]:
    """The same in float64, token by token: log π(a | S) = z_a − log Σ_S exp z, H = −Σ_S p log p."""
    logprobs, entropies = [], []
    h, w, b = (each.double().numpy() for each in (hidden, weight, bias))
    for t, target in enumerate(targets):
        kept = supports.token_ids[supports.offsets[t] : supports.offsets[t + 1]]
        logits = (w[kept] @ h[entry[t]] + b[kept]) / temperature[t]
        of_kept = logits - np.log(np.exp(logits).sum())
        logprobs.append(of_kept[kept == target].item())
        entropies.append(-(np.exp(of_kept) * of_kept).sum())
    return np.array(logprobs), np.array(entropies)


def masked(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    entry: Any,
    targets: Any,
    supports: Supports,
    divisor: Tensor,
    map: Any,
) -> tuple[Tensor, Tensor]:
    """By autograd through all logits, of which those outside of the support are −inf."""
    logits = map(hidden @ weight.T + bias)[torch.from_numpy(entry)] / divisor[:, None]
    kept = torch.zeros(logits.shape, dtype=torch.bool)
    kept[np.repeat(np.arange(len(targets)), supports.sizes), supports.token_ids.astype(np.int64)] = True
    logprobs = torch.log_softmax(logits.masked_fill(~kept, -torch.inf), -1)
    finite = logprobs.masked_fill(~kept, 0)
    entropies = -(logprobs.exp() * finite).sum(-1)
    return logprobs[torch.arange(len(targets)), torch.from_numpy(targets)], entropies


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**32),
    rows=st.integers(1, 6),
    tokens=st.integers(1, 12),
    vocabulary=st.sampled_from([5, 300, 700]),
    of_rows=st.booleans(),
    map=st.sampled_from([IDENTITY, LogitMap(0.5, 2.0)]),
)
def test_values_and_gradients_are_those_of_all_logits_masked_to_the_support(
    seed: int, rows: int, tokens: int, vocabulary: int, of_rows: bool, map: LogitMap
) -> None:
    hidden, weight, bias, entry, targets, supports = problem(seed, rows, tokens, vocabulary)
    own = torch.tensor([0.3, 1.0, 2.5])[torch.arange(rows) % 3] if of_rows else 0.7
    divisor = own[entry] if isinstance(own, Tensor) else torch.full((tokens,), 0.7)
    packed = PackedSupports.of(supports, targets, CPU)
    assert packed is not None
    assert packed.whole is None
    found = [x.clone().requires_grad_() for x in (hidden, weight)]
    wanted = [x.double().requires_grad_() for x in (hidden, weight)]
    weights = torch.randn(2, tokens, generator=torch.Generator().manual_seed(seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head, "MAX_LOGITS", rows * 128)  # chunks of 128 columns
        both = support_logprobs(found[0], found[1], bias, packed, torch.from_numpy(entry), own, map)
        (torch.stack(both) * weights).sum().backward()  # type: ignore[no-untyped-call]
    expected = masked(wanted[0], wanted[1], bias.double(), entry, targets, supports, divisor.double(), map)
    (torch.stack(expected) * weights.double()).sum().backward()  # type: ignore[no-untyped-call]
    for mine, theirs in zip(both, expected, strict=True):
        torch.testing.assert_close(mine.double(), theirs.detach(), rtol=1e-5, atol=1e-5)
    if map is IDENTITY:
        plain = by_numpy(hidden, weight, bias, entry, targets, supports, divisor.double().numpy())
        np.testing.assert_allclose(torch.stack(both).detach().numpy(), np.stack(plain), rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert float((mine.grad - theirs.grad).norm()) <= 1e-5 * max(1.0, float(theirs.grad.norm()))


def neighbour(supports: Supports, targets: Any) -> Supports:
    """Each token has the support of the next one, and its own sampled token."""
    sets = np.split(supports.token_ids, supports.offsets[1:-1])
    return Supports.of([np.union1d(each, [t]) for each, t in zip(sets[1:] + sets[:1], targets, strict=True)])


def without_last(supports: Supports, targets: Any) -> Supports:
    """Each support lacks its last token, unless that was sampled."""
    sets = np.split(supports.token_ids, supports.offsets[1:-1])
    return Supports.of([np.union1d(each[:-1], [t]) for each, t in zip(sets, targets, strict=True)])


def everything(supports: Supports, targets: Any) -> Supports:
    """Not renormalized: the logprobs of the whole vocabulary."""
    return Supports.of([np.arange(300)] * len(targets))


@pytest.mark.parametrize("mistake", [neighbour, without_last, everything])
def test_a_planted_mistake_shows(mistake: Callable[[Supports, Any], Supports]) -> None:
    hidden, weight, bias, entry, targets, supports = problem(3, 4, 9, 300)
    wanted = by_numpy(hidden, weight, bias, entry, targets, supports, np.ones(9))
    for used, differs in ((supports, False), (mistake(supports, targets), True)):
        packed = PackedSupports.of(used, targets, CPU)
        assert packed is not None
        found = support_logprobs(hidden, weight, bias, packed, torch.from_numpy(entry), 1.0, IDENTITY)
        for mine, theirs in zip(found, wanted, strict=True):
            assert bool(np.abs(mine.numpy() - theirs).max() > 1e-2) is differs


def test_a_support_of_one_token_teaches_nothing() -> None:
    hidden, weight, bias, entry, targets, _ = problem(1, 4, 9, 300)
    packed = PackedSupports.of(Supports.of([[t] for t in targets]), targets, CPU)
    assert packed is not None
    learned = [x.requires_grad_() for x in (hidden, weight)]
    logprobs, entropies = support_logprobs(hidden, weight, bias, packed, torch.from_numpy(entry), 1.0, IDENTITY)
    (logprobs.sum() + entropies.sum()).backward()  # type: ignore[no-untyped-call]
    assert not logprobs.any()
    assert not entropies.any()
    assert not any(x.grad.any() for x in learned)


def test_bfloat16_is_multiplied_as_float32() -> None:
    """Only inputs and gradients are rounded to bfloat16, not the logits."""
    hidden, weight, _, entry, targets, supports = problem(0, 6, 12, 700)
    packed = PackedSupports.of(supports, targets, CPU)
    assert packed is not None
    half, whole = (
        [x.bfloat16().to(dtype).requires_grad_() for x in (hidden, weight)] for dtype in (torch.bfloat16, torch.float32)
    )
    found, wanted = (
        support_logprobs(a, b, None, packed, torch.from_numpy(entry), 0.7, IDENTITY)[0] for a, b in (half, whole)
    )
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    found.sum().backward()  # type: ignore[no-untyped-call]
    wanted.sum().backward()  # type: ignore[no-untyped-call]
    for mine, theirs in zip(half, whole, strict=True):
        assert mine.grad.dtype is torch.bfloat16
        assert float((mine.grad.float() - theirs.grad).norm() / theirs.grad.norm()) < 0.01


def test_a_support_without_the_sampled_token_is_refused() -> None:
    with pytest.raises(ContractError, match="token 8 at index 1 is none of the 2 tokens that it was sampled from"):
        PackedSupports.of(Supports.of([[3, 7], [5, 7]]), np.array([3, 8]), CPU)


def test_tokens_of_the_whole_vocabulary_have_no_support() -> None:
    assert PackedSupports.of(Supports.of([[], []]), np.array([3, 8]), CPU) is None
    packed = PackedSupports.of(Supports.of([[], [8, 9], []]), np.array([3, 8, 1]), CPU)
    assert packed is not None
    assert packed.whole is not None
    assert (packed.truncated.tolist(), packed.whole.tolist()) == ([1], [0, 2])
    assert replace(packed, whole=None).vocabulary.tolist() == [8, 9]
