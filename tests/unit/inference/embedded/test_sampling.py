"""Truncated sampling (top_k, top_p): the embedded engine keeps the tokens that transformers and vLLM keep."""

from __future__ import annotations

import importlib
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlmrl.inference.embedded.sampling import truncated
from vlmrl.inference.vllm.server import vllm_version
from vlmrl.models import broken_wheels

SHAPES = [(0, 1.0), (1, 1.0), (5, 1.0), (0, 0.3), (0, 0.9), (0, 1e-6), (7, 0.5), (2, 0.99), (10**6, 0.7), (50, 1.0)]


def random_logits(seed: int, rows: int = 40, vocabulary: int = 50) -> torch.Tensor:
    """Logits of very different sharpness; the first ten tokens are banned."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocabulary, generator=generator) * torch.logspace(-1, 1, rows)[:, None]
    logits[:, :10] = -torch.inf
    return logits


@pytest.mark.parametrize(("top_k", "top_p"), SHAPES)
def test_the_distribution_is_that_of_transformers(top_k: int, top_p: float) -> None:
    from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

    logits = random_logits(0)
    expected = logits
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    found = truncated(torch.log_softmax(logits, -1), top_k, top_p)
    assert torch.equal(found.isinf(), expected.isinf())
    torch.testing.assert_close(found.exp(), torch.softmax(expected, -1))


@pytest.mark.vllm
@pytest.mark.parametrize(("top_k", "top_p"), SHAPES)
def test_the_distribution_is_that_of_vllm(top_k: int, top_p: float) -> None:
    if vllm_version() is None:
        pytest.skip("vLLM is not installed")
    broken_wheels.install()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sampler = importlib.import_module("vllm.v1.sample.ops.topk_topp_sampler")
    logits = random_logits(1)
    rows, vocabulary = logits.shape
    k = None if top_k == 0 else torch.full((rows,), min(top_k, vocabulary))
    p = None if top_p == 1 else torch.full((rows,), top_p)
    expected = sampler.apply_top_k_top_p_pytorch(logits.clone(), k, p)
    found = truncated(torch.log_softmax(logits, -1), top_k, top_p)
    assert torch.equal(found.isinf(), expected.isinf())
    torch.testing.assert_close(found.exp(), torch.softmax(expected, -1))


def test_nothing_changes_without_truncation() -> None:
    log_probs = torch.log_softmax(random_logits(2), -1)
    assert truncated(log_probs, 0, 1.0) is log_probs


@given(st.integers(0, 2**32), st.integers(1, 60), st.floats(1e-3, 1))
def test_what_is_left_sums_to_one_and_is_never_empty(seed: int, top_k: int, top_p: float) -> None:
    found = truncated(torch.log_softmax(random_logits(seed, rows=5), -1), top_k, top_p)
    np.testing.assert_allclose(found.exp().sum(-1), 1, rtol=1e-5)
    assert not found.isnan().any()
    assert (found > -torch.inf).sum(-1).max() <= top_k
