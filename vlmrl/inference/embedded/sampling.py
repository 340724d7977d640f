"""Sampling one token per request from hidden states."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vlmrl.errors import NonFiniteLossError
from vlmrl.inference.embedded.cached_policy import CachedPolicy
from vlmrl.types import FloatArray, IntArray, SamplingParams


def uniform_numbers(sampling: SamplingParams) -> np.ndarray:
    """float64 [max_new_tokens] in [0, 1): one number per token, from the request's seed alone (Philox)."""
    return np.random.Generator(np.random.Philox(key=sampling.seed)).random(sampling.max_new_tokens)


def sample_tokens(
    model: CachedPolicy, hidden: Tensor, row: IntArray, params: Sequence[SamplingParams], uniforms: Sequence[float]
) -> tuple[IntArray, FloatArray]:
    """Sample one token for each of N requests → tokens int64 [N], logprobs float32 [N].

    hidden float [rows, hidden]; `row` int64 [N] is the row of each request; temperature 0.0 takes the most probable
    token; `uniforms` in [0, 1) pick a token by the inverse of the cumulative distribution.
    Raises `NonFiniteLossError` where a probability is NaN or infinite.
    """
    tokens = np.empty(len(row), np.int64)
    chosen = np.empty(len(row), np.float32)
    shapes = [(each.temperature, each.top_k, each.top_p) for each in params]
    for temperature, top_k, top_p in set(shapes):
        members = np.array([i for i, other in enumerate(shapes) if other == (temperature, top_k, top_p)])
        log_probs = model.policy.log_probs(hidden, temperature)
        if temperature == 0:
            picked = log_probs.argmax(-1).cpu().numpy()[row[members]]
        else:
            log_probs = truncated(log_probs, top_k, top_p)
            # The cumulative distribution in float64; the last token with a probability takes the rounding error.
            cumulative = log_probs.double().exp().cumsum(-1)
            cumulative /= cumulative[:, -1:].clone()
            draw = torch.tensor([uniforms[i] for i in members], dtype=torch.float64)
            rows = cumulative[torch.from_numpy(row[members])]
            picked = torch.searchsorted(rows, draw.to(rows.device)[:, None], right=True)[:, 0].cpu().numpy()
            picked = picked.clip(max=rows.shape[1] - 1)  # past the end only for NaN, which is refused below
        tokens[members] = picked
        chosen[members] = log_probs[torch.from_numpy(row[members]), torch.from_numpy(picked)].cpu().numpy()
    if not np.isfinite(chosen).all():
        raise NonFiniteLossError(
            f"the policy of version {model.version} gives probabilities that are not finite, so it cannot sample: "
            + (
                "continue from an earlier checkpoint with a lower trainer.learning_rate"
                if model.version
                else "no RL step has changed it yet, so check the checkpoint's weights, orchestrator.temperature and, "
                "after a warm-up, trainer.warmup.learning_rate"
            )
        )
    return tokens, chosen


def truncated(log_probs: Tensor, top_k: int, top_p: float) -> Tensor:
    """The log of the distribution that `SamplingParams.top_k` and then `top_p` leave, of the same shape.

    log_probs float [rows, vocabulary], normalized; the tokens that cannot be sampled get −inf, and the others sum to 1
    again. It keeps the same tokens as vLLM's sampler (`apply_top_k_top_p_pytorch`).

    >>> probabilities = torch.tensor([[0.5, 0.25, 0.125, 0.125]])
    >>> truncated(probabilities.log(), 0, 0.6).exp()
    tensor([[0.6667, 0.3333, 0.0000, 0.0000]])
    >>> truncated(probabilities.log(), 3, 1.0).exp()
    tensor([[0.5000, 0.2500, 0.1250, 0.1250]])
    """
    if 0 < top_k < log_probs.shape[1]:
        kth = log_probs.topk(top_k, dim=-1).values[:, -1:]
        log_probs = torch.log_softmax(log_probs.masked_fill(log_probs < kth, float("-inf")), -1)
    if top_p < 1:
        ordered, tokens = log_probs.sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.double().exp()
        before = probabilities.cumsum(-1) - probabilities
        before[:, 0] = 0.0  # the most probable token always stays
        removed = torch.zeros_like(before, dtype=torch.bool).scatter(-1, tokens, before >= top_p)
        log_probs = torch.log_softmax(log_probs.masked_fill(removed, float("-inf")), -1)
    return log_probs
