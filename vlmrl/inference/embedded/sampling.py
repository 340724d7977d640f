"""Sampling one token per request from hidden states."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlmrl.errors import NonFiniteLossError
from vlmrl.inference.embedded.cached_policy import CachedPolicy
from vlmrl.types import MAX_SUPPORT, IntArray, SamplingParams


def uniform_numbers(sampling: SamplingParams) -> np.ndarray:
    """float64 [max_new_tokens] in [0, 1): one number per token, from the request's seed alone (Philox)."""
    return np.random.Generator(np.random.Philox(key=sampling.seed)).random(sampling.max_new_tokens)


@dataclass(frozen=True)
class SampledToken:
    """What one request gets in one step."""

    token: int
    logprob: float
    """Natural log of the token's probability under the distribution that it was sampled from."""
    support: NDArray[np.int32] | None
    """int32 [k], ascending; the tokens that it was sampled from. None where the request does not want it reported."""


def sample_tokens(
    model: CachedPolicy, hidden: Tensor, row: IntArray, params: Sequence[SamplingParams], uniforms: Sequence[float]
) -> list[SampledToken]:
    """Sample one token for each of N requests.

    hidden float [rows, hidden]; `row` int64 [N] is the row of each request; temperature 0.0 takes the most probable
    token; `uniforms` in [0, 1) pick a token by the inverse of the cumulative distribution.
    Raises `NonFiniteLossError` where a probability is NaN or infinite.
    """
    tokens = np.empty(len(row), np.int64)
    chosen = np.empty(len(row), np.float32)
    supports: list[NDArray[np.int32] | None] = [None] * len(row)
    shapes = [shape_of(each) for each in params]
    for shape in set(shapes):
        members = np.array([i for i, other in enumerate(shapes) if other == shape])
        log_probs = model.policy.log_probs(hidden, shape.temperature)
        if shape.temperature == 0:
            picked = log_probs.argmax(-1).cpu().numpy()[row[members]]
        else:
            log_probs = truncated(log_probs, shape.top_k, shape.top_p, shape.min_p)
            # The cumulative distribution in float64; the last token with a probability takes the rounding error.
            cumulative = log_probs.double().exp().cumsum(-1)
            cumulative /= cumulative[:, -1:].clone()
            draw = torch.tensor([uniforms[i] for i in members], dtype=torch.float64)
            rows = cumulative[torch.from_numpy(row[members])]
            picked = torch.searchsorted(rows, draw.to(rows.device)[:, None], right=True)[:, 0].cpu().numpy()
            picked = picked.clip(max=rows.shape[1] - 1)  # past the end only for NaN, which is refused below
        tokens[members] = picked
        chosen[members] = log_probs[torch.from_numpy(row[members]), torch.from_numpy(picked)].cpu().numpy()
        if shape.reports_support:
            of_rows = supports_of(log_probs)
            for i in members:
                supports[i] = of_rows[row[i]]
    if not np.isfinite(chosen).all():
        raise not_finite(model.version)
    return [SampledToken(*each) for each in zip(tokens.tolist(), chosen.tolist(), supports, strict=True)]


def not_finite(version: int) -> NonFiniteLossError:
    """The error for probabilities that are NaN or infinite."""
    return NonFiniteLossError(
        f"the policy of version {version} gives probabilities that are not finite, so it cannot sample: "
        + (
            "continue from an earlier checkpoint with a lower trainer.learning_rate"
            if version
            else "no RL step has changed it yet, so check the checkpoint's weights, orchestrator.temperature and, "
            "after a warm-up, trainer.warmup.learning_rate"
        )
    )


@dataclass(frozen=True)
class Shape:
    """The distribution of a request: requests of one shape are sampled together."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    reports_support: bool

    @property
    def truncates(self) -> bool:
        """Whether some tokens are ruled out."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)


def shape_of(params: SamplingParams) -> Shape:
    """The distribution of a request."""
    reports = params.reports_support and params.truncates
    top_k = min(params.top_k or MAX_SUPPORT, MAX_SUPPORT) if reports else params.top_k
    return Shape(params.temperature, top_k, params.top_p, params.min_p, reports)


def supports_of(log_probs: Tensor) -> list[NDArray[np.int32]]:
    """Of each row of a truncated distribution [rows, vocabulary], the tokens that can be sampled."""
    rows, tokens = (log_probs > float("-inf")).nonzero(as_tuple=True)
    ends = rows.bincount(minlength=len(log_probs)).cumsum(0)[:-1]
    return np.split(tokens.to(torch.int32).cpu().numpy(), ends.cpu().numpy())


def truncated(log_probs: Tensor, top_k: int, top_p: float, min_p: float = 0.0) -> Tensor:
    """The log of the distribution that `SamplingParams.min_p`, then `top_k` and then `top_p` leave, of the same shape.

    log_probs float [rows, vocabulary], normalized; the tokens that cannot be sampled get −inf, and the others sum to 1
    again. It keeps the same tokens as vLLM's sampler (`MinPLogitsProcessor`, then `apply_top_k_top_p_pytorch`).

    >>> probabilities = torch.tensor([[0.5, 0.25, 0.125, 0.125]])
    >>> truncated(probabilities.log(), 0, 0.6).exp()
    tensor([[0.6667, 0.3333, 0.0000, 0.0000]])
    >>> truncated(probabilities.log(), 3, 1.0).exp()
    tensor([[0.5000, 0.2500, 0.1250, 0.1250]])
    >>> truncated(probabilities.log(), 0, 1.0, min_p=0.4).exp()
    tensor([[0.6667, 0.3333, 0.0000, 0.0000]])
    """
    if min_p > 0:
        below = log_probs < log_probs.amax(-1, keepdim=True) + math.log(min_p)
        log_probs = torch.log_softmax(log_probs.masked_fill(below, float("-inf")), -1)
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
