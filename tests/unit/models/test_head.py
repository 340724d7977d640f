"""Logprobs by chunks of the vocabulary equal log_softmax, and their memory does not grow with the vocabulary."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from support.compiling import compile_as_on_a_gpu
from vlmrl.models import head
from vlmrl.models.head import most_likely, token_and_top_logprobs, token_logprobs
from vlmrl.models.logit_map import IDENTITY


def problem(seed: int, rows: int, tokens: int, vocabulary: int, banned: int) -> Any:
    """hidden, weight, bias, banned, entry, targets. No target is banned; rows and targets occur more than once."""
    random = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(rows, 8, generator=random), torch.randn(vocabulary, 8, generator=random)
    order = torch.randperm(vocabulary, generator=random)
    forbidden = torch.zeros(vocabulary, dtype=torch.bool)
    forbidden[order[:banned]] = True
    entry = torch.randint(rows, (tokens,), generator=random)
    targets = order[banned:][torch.randint(vocabulary - banned, (tokens,), generator=random)]
    return hidden, weight, torch.randn(vocabulary, generator=random), forbidden, entry, targets


def plain(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    banned: Tensor,
    entry: Tensor,
    targets: Tensor,
    t: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """The same values by log_softmax over the whole vocabulary, in float64."""
    logits = hidden.double() @ weight.double().T + (0 if bias is None else bias.double())
    logprobs = torch.log_softmax((logits / t).masked_fill(banned, -torch.inf), -1)
    allowed = logprobs[:, ~banned]
    return logprobs[entry, targets], -(allowed.exp() * allowed).sum(-1)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    rows=st.integers(1, 9),
    tokens=st.integers(1, 20),
    vocabulary=st.sampled_from([5, 128, 300, 700]),
    temperature=st.sampled_from([0.3, 1.0, 2.5, None]),
    with_bias=st.booleans(),
    used=st.sampled_from([(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)]),
    data=st.data(),
)
def test_values_and_gradients_are_those_of_log_softmax(
    seed: int,
    rows: int,
    tokens: int,
    vocabulary: int,
    temperature: float | None,
    with_bias: bool,
    used: tuple[float, float],
    data: st.DataObject,
) -> None:
    """`used`: factors on logprobs and entropies in the loss. One that is 0 is left out of the graph. Without a
    `temperature`, each row has its own."""
    banned = data.draw(st.integers(0, vocabulary - 1))
    hidden, weight, bias, forbidden, entry, targets = problem(seed, rows, tokens, vocabulary, banned)
    chosen = bias if with_bias else None
    found = [x.clone().requires_grad_() for x in (hidden, weight)]
    wanted = [x.clone().double().requires_grad_() for x in (hidden, weight)]
    random = torch.Generator().manual_seed(seed)
    weights = torch.randn(tokens, generator=random), torch.randn(rows, generator=random)
    own = torch.tensor([0.3, 1.0, 2.5])[torch.randint(3, (rows,), generator=random)]
    divisor = own if temperature is None else temperature

    def loss_of(*values: Tensor) -> Tensor:
        terms = [(w.to(v.dtype) * v).sum() for w, v, part in zip(weights, values, used, strict=True) if part]
        return torch.stack(terms).sum()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head, "MAX_LOGITS", rows * 128)  # chunks of 128 columns
        logprobs, entropies = token_logprobs(found[0], found[1], chosen, forbidden, entry, targets, divisor)
        loss_of(logprobs, entropies).backward()  # type: ignore[no-untyped-call]
    divisors = own.double()[:, None] if temperature is None else temperature
    reference, reference_entropies = plain(wanted[0], wanted[1], chosen, forbidden, entry, targets, divisors)
    loss_of(reference, reference_entropies).backward()  # type: ignore[no-untyped-call]
    assert logprobs.dtype is entropies.dtype is torch.float32
    torch.testing.assert_close(logprobs.double(), reference, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(entropies.double(), reference_entropies, rtol=1e-5, atol=2e-5)
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-4, atol=2e-4 / (temperature or 0.3))


def test_bfloat16_is_multiplied_as_float32() -> None:
    """Only inputs and gradients are rounded to bfloat16, not the logits."""
    hidden, weight, _, forbidden, entry, targets = problem(0, 6, 12, 700, 50)
    half, whole = (
        [x.bfloat16().to(dtype).requires_grad_() for x in (hidden, weight)] for dtype in (torch.bfloat16, torch.float32)
    )
    found, wanted = (token_logprobs(a, b, None, forbidden, entry, targets, 0.7)[0] for a, b in (half, whole))
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    found.sum().backward()  # type: ignore[no-untyped-call]
    wanted.sum().backward()  # type: ignore[no-untyped-call]
    for mine, theirs in zip(half, whole, strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert mine.grad.dtype is torch.bfloat16
        assert float((mine.grad.float() - theirs.grad).norm() / theirs.grad.norm()) < 0.01


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # which tracing reads of a view
@pytest.mark.parametrize("temperature", [0.7, torch.tensor([0.3, 1.0, 2.5, 0.3, 1.0, 2.5])], ids=["one", "per row"])
def test_what_a_gpu_compiles_computes_the_same(monkeypatch: pytest.MonkeyPatch, temperature: float | Tensor) -> None:
    """The same graphs, traced for all sizes, by a back-end that needs no compiler."""
    hidden, weight, bias, forbidden, entry, targets = problem(3, 6, 12, 700, 50)
    found = []
    for is_compiled in (False, True):
        if is_compiled:
            compile_as_on_a_gpu(monkeypatch)
        learned = [x.clone().requires_grad_() for x in (hidden, weight)]
        logprobs, entropies = token_logprobs(learned[0], learned[1], bias, forbidden, entry, targets, temperature)
        (logprobs.sum() + entropies.sum()).backward()  # type: ignore[no-untyped-call]
        found.append([logprobs, entropies, *(x.grad for x in learned)])
    for eager, traced in zip(*found, strict=True):
        torch.testing.assert_close(traced, eager, rtol=1e-6, atol=1e-6)


def test_a_frozen_head_or_frozen_hidden_states_get_no_gradient() -> None:
    hidden, weight, _, forbidden, entry, targets = problem(0, 3, 4, 200, 0)
    for learning in (hidden, weight):
        learning.requires_grad_()
        token_logprobs(hidden, weight, None, forbidden, entry, targets, 1.0)[0].sum().backward()  # type: ignore[no-untyped-call]
        assert learning.grad is not None
        learning.requires_grad_(False)
        assert (hidden.grad is None) == (learning is weight)
        hidden.grad = weight.grad = None


class Peak(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The peak of the bytes of tensors that operations create. Views count once; older tensors do not count."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live, self.highest = 0, 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in before | self._known:
                storage = tensor.untyped_storage()
                pointer, size = storage.data_ptr(), storage.nbytes()
                self._known.add(pointer)
                self.live += size
                self.highest = max(self.highest, self.live)
                weakref.finalize(tensor, self._gone, pointer, size)
        return out

    def _gone(self, pointer: int, size: int) -> None:
        self._known.discard(pointer)
        self.live -= size


def peak(vocabulary: int, logprobs: Callable[..., Tensor]) -> int:
    """Bytes at most while the logprobs of 64 tokens and their gradients are computed; the gradient of the weights is
    left out, being as large as they are."""
    hidden, weight, _, forbidden, entry, targets = problem(0, 64, 64, vocabulary, 0)
    hidden.requires_grad_()
    weight.requires_grad_()
    with Peak() as measured:
        logprobs(hidden, weight, None, forbidden, entry, targets, 1.0).sum().backward()  # type: ignore[no-untyped-call]
    return int(measured.highest - weight.nbytes)


@pytest.mark.parametrize("output", [0, 1])
def test_memory_is_flat_in_the_vocabulary(output: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the logprobs, and of the entropies."""
    monkeypatch.setattr(head, "MAX_LOGITS", 64 * 1024)
    small, large = (peak(size, lambda *args: token_logprobs(*args)[output]) for size in (8 * 1024, 64 * 1024))
    assert small >= 64 * 1024 * 4, "the measure sees a chunk of logits"
    assert large <= 1.01 * small
    assert peak(64 * 1024, lambda *args: plain(*args)[0]) > 7 * peak(8 * 1024, lambda *args: plain(*args)[0])


@pytest.mark.parametrize("output", ["most likely", "given"])
def test_memory_of_top_tokens_is_flat_in_the_vocabulary(output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.arange(32).expand(64, 32)

    def top(*args: Any) -> Tensor:
        given: Any = token_and_top_logprobs
        found: Any = most_likely
        if output == "given":
            values: Tensor = given(*args, IDENTITY, ids)[2]
            return values
        both: Tensor = token_logprobs(*args)[0] + found(*args, IDENTITY, 32)[0]
        return both

    monkeypatch.setattr(head, "MAX_LOGITS", 64 * 1024)
    small, large = (peak(size, top) for size in (8 * 1024, 64 * 1024))
    assert large <= 1.01 * small


def test_the_gradient_of_the_entropies_takes_no_memory_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "MAX_LOGITS", 64 * 1024)
    logprobs, both = (
        peak(16 * 1024, lambda *args, used=used: torch.cat(token_logprobs(*args)[:used])) for used in (1, 2)
    )
    assert both <= 1.01 * logprobs
