"""Families with windows, soft caps and images that see themselves: a packed tree against transformers, one by one.

The models are float64, because float32 alone moves some gradients by more than 1e-5. The head computes in float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from support import attention_kinds as kinds
from support.attention_kinds import Part, image, sample
from support.helpers import Sampled
from vlmrl.config.trainer import Packing
from vlmrl.models.attention import plan as tree_plan
from vlmrl.models.families.positions import position_function
from vlmrl.models.policy import Policy
from vlmrl.trainer.forward import loss_logprobs
from vlmrl.trainer.packing import pack
from vlmrl.types import TrainingSample

CPU = torch.device("cpu")


def samples_for(name: str) -> list[TrainingSample]:
    """Branches that begin inside a window, at its border and behind it; prefixes with images at both ends."""
    start = list(range(1, 9))
    branches: list[list[Part]] = [
        [start, Sampled([11, 12, 13])],
        [start, Sampled([11, 12, 14, 15, 16, 17, 18, 19, 20]), [3, 4], Sampled([5])],
        [start, Sampled([11, 12, 14, 15, 16, 17, 18, 19, 21, 22])],
        [start, [30, 31], Sampled([9])],
        [[2, 3], Sampled([4])],
        [[*start, *start, *start], Sampled([9, 10, 11])],
    ]
    if name in kinds.SEE_IMAGES:
        first, second = image(name, 1), image(name, 2)
        branches += [
            [first, [1, 2], Sampled([3, 4])],
            [first, [1, 2], Sampled([3, 5]), [6], second, Sampled([7])],
            [first, [1, 2], Sampled([3, 5]), [6], second, Sampled([8, 9])],
            [first, [1, 2], second, Sampled([10])],
            [start, second, Sampled([11, 12]), [13], first, [14], Sampled([15, 16, 17, 18])],
            [start, second, Sampled([11, 13])],
            [first, second, Sampled([3])],
        ]
    return [sample(f"s{i}", *parts) for i, parts in enumerate(branches)]


def loss_of(logprobs: Tensor, advantages: Tensor) -> Tensor:
    return (logprobs * advantages).sum()


def one_by_one(model: Any, samples: list[TrainingSample]) -> list[Tensor]:
    """Logprobs of each sample's loss tokens by transformers; leaves gradients of their sum times the advantages."""
    found = []
    for each in samples:
        logits = kinds.plain_logits(model, each.token_ids, each.mm_token_type_ids, each.mm_items)
        where = torch.from_numpy(np.flatnonzero(each.loss_mask))
        logprobs = torch.log_softmax(logits, -1)[where - 1, torch.from_numpy(each.token_ids)[where]]
        loss_of(logprobs, torch.from_numpy(each.advantages)[where]).backward()  # type: ignore[no-untyped-call]
        found.append(logprobs.detach())
    return found


def packed(model: Any, samples: list[TrainingSample], packing: Packing) -> list[Tensor]:
    """The same by the policy, in one pass."""
    policy = Policy(model, position_function("sequential"), [])
    found: list[Tensor] = [torch.empty(0)] * len(samples)
    for batch in pack(samples, packing, 4096, policy.positions, CPU, rules=policy.rules):
        logprobs, _ = loss_logprobs(policy, batch, 1.0)
        loss_of(logprobs, batch.advantages).backward()  # type: ignore[no-untyped-call]
        for i in range(len(samples)):
            mine = logprobs.detach()[batch.sample_index == i]
            found[i] = mine if len(mine) else found[i]
    return found


@pytest.mark.parametrize(
    ("window", "packing", "threshold"),
    [
        (1, Packing.tree, 16384),
        (4, Packing.tree, 1),
        (7, Packing.tree, 60),
        (10, Packing.varlen, 1),
        (64, Packing.tree, 1),
    ],
)
@pytest.mark.parametrize("name", list(kinds.MODELS))
def test_a_packed_tree_is_transformers_one_by_one(
    name: str, window: int, packing: Packing, threshold: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tree_plan, "MIN_SHARED_PAIRS", threshold)
    monkeypatch.setattr(tree_plan, "MIN_WINDOWED_ROWS", 4)
    samples = samples_for(name)
    theirs, mine = (kinds.build(name, window).double() for _ in range(2))
    wanted = one_by_one(theirs, samples)
    found = packed(mine, samples, packing)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=1e-5)
    expected = {key: parameter.grad for key, parameter in theirs.named_parameters() if parameter.grad is not None}
    found_gradients = {key: parameter.grad for key, parameter in mine.named_parameters() if parameter.grad is not None}
    assert found_gradients.keys() == expected.keys()
    largest = max(float(gradient.norm()) for gradient in expected.values())
    for key, gradient in expected.items():
        # Some gradients are 0 but for rounding: of queries that see one key, and of a key's bias.
        assert float((found_gradients[key] - gradient).norm()) <= 1e-5 * float(gradient.norm()) + 1e-7 * largest, key
