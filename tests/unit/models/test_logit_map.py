"""The factor and the soft cap of a model's logits, measured on its own forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from support import attention_kinds as kinds
from vlmrl.errors import ModelError
from vlmrl.models.head import token_logprobs
from vlmrl.models.logit_map import IDENTITY, LogitMap, logit_map


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gemma2", LogitMap(cap=2.0)),
        ("gemma3", IDENTITY),
        ("gemma4", LogitMap(cap=3.0)),
        ("mistral", IDENTITY),
        ("cohere2", LogitMap(scale=0.0625)),
        ("granite", LogitMap(scale=0.25)),
    ],
)
def test_the_map_is_the_models_own(name: str, expected: LogitMap) -> None:
    """Expected: `final_logit_softcapping`, `logit_scale` and 1 / `logits_scaling` of the configs."""
    model = kinds.build(name, 4)
    before = model(input_ids=torch.tensor([[1, 2]])).logits
    assert logit_map(model) == expected
    torch.testing.assert_close(model(input_ids=torch.tensor([[1, 2]])).logits, before, rtol=0, atol=0)


def changed(model: Any, change: Any) -> Any:
    class Other(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = change(out.logits)
            return out

    model.__class__ = Other
    return model


@pytest.mark.parametrize("change", [lambda z: z + 1, lambda z: z**3, lambda z: z.clamp(-5, 5), lambda z: z.abs()])
def test_another_map_is_refused(change: Any) -> None:
    with pytest.raises(ModelError, match=r"Other\.forward makes .* of a logit of 60"):
        logit_map(changed(kinds.build("mistral", 4), change))


def test_a_forward_that_cannot_be_asked_is_refused() -> None:
    def fail(logits: Tensor) -> Tensor:
        raise RuntimeError("no")

    with pytest.raises(ModelError, match=r"could not be asked .* \(RuntimeError: no\)"):
        logit_map(changed(kinds.build("mistral", 4), fail))
    with pytest.raises(ModelError, match=r"could not be asked .* 12 outputs of the head became 3 logits"):
        logit_map(changed(kinds.build("mistral", 4), lambda logits: logits[..., :3]))


@pytest.mark.parametrize("mapping", [LogitMap(0.5), LogitMap(cap=3.0), LogitMap(2.0, 1.5)])
def test_logprobs_and_gradients_are_those_of_mapped_logits(mapping: LogitMap) -> None:
    random = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(7, 6, generator=random), nn.Linear(6, 300, bias=True)
    entry, targets = torch.tensor([0, 0, 3, 6]), torch.tensor([5, 299, 128, 7])
    banned = torch.zeros(300, dtype=torch.bool)
    banned[4] = True
    found = [x.detach().clone().requires_grad_() for x in (hidden, head.weight)]
    bias = head.bias.detach()
    logprobs, entropies = token_logprobs(found[0], found[1], bias, banned, entry, targets, 0.7, mapping)
    wanted = [x.detach().double().requires_grad_() for x in (hidden, head.weight)]
    logits = (wanted[0] @ wanted[1].T + bias.double()) * mapping.scale
    if mapping.cap is not None:
        logits = torch.tanh(logits / mapping.cap) * mapping.cap
    log_p = torch.log_softmax((logits / 0.7).masked_fill(banned, -torch.inf), -1)
    expected, allowed = log_p[entry, targets], log_p[:, ~banned]
    uncertain = -(allowed.exp() * allowed).sum(-1)
    torch.testing.assert_close(logprobs.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(entropies.double(), uncertain, rtol=1e-5, atol=1e-6)
    for one, other in ((logprobs, entropies), (expected, uncertain)):
        loss = (one * torch.arange(1.0, 5.0)).sum() - (other * torch.arange(1.0, 8.0)).sum()
        loss.backward()  # type: ignore[no-untyped-call]
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-4, atol=1e-6)
