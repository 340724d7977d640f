"""Digests and slices of weights. tests/unit/inference/vllm/test_engine.py compares with a real engine."""

from __future__ import annotations

import torch

from vlmrl.models.digests import assemble, digest


def test_a_digest_is_of_values() -> None:
    values = torch.tensor([[1.5, -0.0], [2.0, 3.0]])
    assert digest(values) == digest(values.to(torch.bfloat16))
    assert digest(values) == digest(torch.tensor([[1.5, 0.0], [2.0, 3.0]]))
    assert digest(values) == digest(values.t().contiguous().t())
    assert digest(values) != digest(values.t())
    assert digest(values) != digest(values + 2**-20)


def test_assembled_shards_are_the_fused_matrix() -> None:
    """q and k of two ranks: each rank's q rows, then its k rows."""
    q, k = torch.arange(8.0).view(4, 2), torch.arange(20.0, 24.0).view(2, 2)
    tensors = {"q": q, "k": k}
    ranks = [assemble([("q", 0, 2 * rank, 2 * rank + 2), ("k", 0, rank, rank + 1)], tensors) for rank in (0, 1)]
    assert torch.equal(ranks[1], torch.tensor([[4.0, 5.0], [6.0, 7.0], [22.0, 23.0]]))
    assert torch.equal(assemble([("q", 1, 1, 2)], tensors), q[:, 1:])
    assert assemble([("q", -1, 0, 0)], tensors) is q
