"""The most likely tokens of a row and the logprobs of given ones, by chunks, equal those of the whole row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from support.compiling import compile_as_on_a_gpu
from vlmrl.models import head
from vlmrl.models.head import most_likely, token_and_top_logprobs, token_logprobs
from vlmrl.models.logit_map import IDENTITY, LogitMap
from vlmrl.models.top_tokens import SMALLEST_TAIL

CAPPED = LogitMap(scale=0.5, cap=3.0)
VOCABULARY = 300
"""Three chunks of 128 columns; 200 tokens are more than a chunk."""


def problem(seed: int, rows: int, banned: int, dtype: torch.dtype = torch.float32) -> Any:
    """hidden, weight, bias, banned, entry, targets, a temperature per row. Every row has at least one target."""
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, 8, generator=random).to(dtype)
    weight = torch.randn(VOCABULARY, 8, generator=random).to(dtype)
    order = torch.randperm(VOCABULARY, generator=random)
    forbidden = torch.zeros(VOCABULARY, dtype=torch.bool)
    forbidden[order[:banned]] = True
    entry = torch.cat([torch.arange(rows), torch.randint(rows, (3,), generator=random)])
    targets = order[banned:][torch.randint(VOCABULARY - banned, (rows + 3,), generator=random)]
    own = torch.tensor([0.3, 1.0, 2.5])[torch.randint(3, (rows,), generator=random)]
    return hidden, weight, torch.randn(VOCABULARY, generator=random), forbidden, entry, targets, own


def whole(hidden: Tensor, weight: Tensor, bias: Tensor, banned: Tensor, t: Tensor, to_logits: LogitMap) -> Tensor:
    """float64 [U, V] by log_softmax over the whole vocabulary."""
    logits = to_logits(hidden.double() @ weight.double().T + bias.double())
    return torch.log_softmax((logits / t.double()[:, None]).masked_fill(banned, -torch.inf), -1)


def with_tail(logprobs: Tensor, ids: Tensor) -> Tensor:
    """float64 [U, k + 1] from [U, V]; the tail is summed over the tokens that are not among `ids`."""
    is_top = torch.zeros_like(logprobs, dtype=torch.bool).scatter_(1, ids, True)
    tail = logprobs.masked_fill(is_top, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logprobs.gather(1, ids), tail], dim=1)


def top_of(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The most likely tokens and their logprobs."""
    top = most_likely(*arguments)[1]
    assert top is not None
    return top


@pytest.fixture
def chunks_of_128(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "MAX_LOGITS", 128)


@pytest.mark.parametrize("k", [1, 7, 200])
@pytest.mark.parametrize("to_logits", [IDENTITY, CAPPED], ids=["plain", "capped"])
def test_the_most_likely_tokens_are_those_of_the_whole_row(k: int, to_logits: LogitMap, chunks_of_128: None) -> None:
    for seed in range(4):
        hidden, weight, bias, banned, entry, targets, own = problem(seed, rows=6, banned=40)
        logprobs = most_likely(hidden, weight, bias, banned, entry, targets, own, to_logits, k)[0]
        ids, top = top_of(hidden, weight, bias, banned, entry, targets, own, to_logits, k)
        wanted = whole(hidden, weight, bias, banned, own, to_logits)
        assert (ids == wanted.topk(k).indices).all()
        assert not banned[ids].any()
        torch.testing.assert_close(top.double(), with_tail(wanted, ids), rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(top.exp().sum(-1), torch.ones(6), rtol=1e-5, atol=0)
        same = token_logprobs(hidden, weight, bias, banned, entry, targets, own, to_logits)[0]
        assert torch.equal(logprobs, same)
        alone, nothing = most_likely(hidden, weight, bias, banned, entry, targets, own, to_logits, 0)
        assert nothing is None
        assert torch.equal(alone, same)


@settings(max_examples=12)
@given(seed=st.integers(0, 2**32), k=st.sampled_from([1, 5, 150, 260]), to_logits=st.sampled_from([IDENTITY, CAPPED]))
def test_logprobs_of_given_tokens_have_the_gradient_of_log_softmax(seed: int, k: int, to_logits: LogitMap) -> None:
    """Together with those of the targets and of the entropies. 260 are all tokens that are not banned: nothing is left
    for the tail, and no gradient goes through it."""
    hidden, weight, bias, banned, entry, targets, own = problem(seed, rows=5, banned=40)
    random = torch.Generator().manual_seed(seed)
    allowed = (~banned).nonzero()[:, 0]
    ids = torch.stack([allowed[torch.randperm(260, generator=random)[:k]] for _ in range(5)])
    factors = [torch.randn(shape, generator=random) for shape in ((8,), (5,), (5, k + 1))]
    mine = [x.clone().requires_grad_() for x in (hidden, weight)]
    theirs = [x.double().requires_grad_() for x in (hidden, weight)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head, "MAX_LOGITS", 128)
        values = token_and_top_logprobs(mine[0], mine[1], bias, banned, entry, targets, own, to_logits, ids)
        torch.stack([(f * v).sum() for f, v in zip(factors, values, strict=True)]).sum().backward()  # type: ignore[no-untyped-call]
    logprobs = whole(theirs[0], theirs[1], bias, banned, own, to_logits)
    inside = logprobs[:, ~banned]
    none_left = torch.full((5, 1), SMALLEST_TAIL, dtype=torch.float64)
    top = torch.cat([logprobs.gather(1, ids), none_left], dim=1) if k == 260 else with_tail(logprobs, ids)
    wanted = [logprobs[entry, targets], -(inside.exp() * inside).sum(-1), top]
    torch.stack([(f * v).sum() for f, v in zip(factors, wanted, strict=True)]).sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(values[2].double(), top, rtol=1e-5, atol=3e-5)
    for one, other in zip(mine, theirs, strict=True):
        assert one.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=2e-4, atol=2e-3)


def test_a_tail_below_the_rounding_of_one_is_exact() -> None:
    """1 − Σ p of float32 numbers would be 0 or 6e-8 here; the probability of the tail is 2.6e-9."""
    weight = torch.tensor([[20.0], [19.0], [0.0], [0.0]])
    hidden, none = torch.ones(1, 1), torch.zeros(4, dtype=torch.bool)
    where = torch.zeros(1, dtype=torch.long)
    ids, top = top_of(hidden, weight, None, none, where, where, 1.0, IDENTITY, 2)
    given_top = token_and_top_logprobs(hidden, weight, None, none, where, where, 1.0, IDENTITY, ids)[2]
    wanted = 2 / torch.tensor([20.0, 19.0, 0, 0]).double().exp().sum()
    for each in (top, given_top):
        torch.testing.assert_close(each[0, -1].double().exp(), wanted, rtol=1e-5, atol=0)


def test_bfloat16_is_multiplied_as_float32(chunks_of_128: None) -> None:
    hidden, weight, bias, banned, entry, targets, own = problem(1, rows=6, banned=40, dtype=torch.bfloat16)
    ids, top = top_of(hidden, weight, bias, banned, entry, targets, own, IDENTITY, 5)
    again = top_of(hidden.float(), weight.float(), bias, banned, entry, targets, own, IDENTITY, 5)
    assert torch.equal(ids, again[0])
    assert torch.equal(top, again[1])


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # which tracing reads of a view
def test_what_a_gpu_compiles_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, bias, banned, entry, targets, own = problem(3, rows=6, banned=40)
    monkeypatch.setattr(head, "MAX_LOGITS", 6 * 128)
    found = []
    for is_compiled in (False, True):
        if is_compiled:
            compile_as_on_a_gpu(monkeypatch)
        ids, likely = top_of(hidden, weight, bias, banned, entry, targets, own, IDENTITY, 9)
        learned = [x.clone().requires_grad_() for x in (hidden, weight)]
        top = token_and_top_logprobs(learned[0], learned[1], bias, banned, entry, targets, own, IDENTITY, ids)[2]
        top.square().sum().backward()  # type: ignore[no-untyped-call]
        found.append([likely, top, *(x.grad for x in learned)])
    for eager, traced in zip(*found, strict=True):
        torch.testing.assert_close(traced, eager, rtol=1e-5, atol=1e-5)
