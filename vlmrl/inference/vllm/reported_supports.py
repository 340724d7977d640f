"""From which tokens vLLM sampled: the most probable tokens that it reports with each sampled one.

    top_k = k ─▶ the logprobs of k + TIES tokens ─▶ those above −inf are the support

With `--logprobs-mode processed_logprobs` the logprobs are those of the distribution that was sampled from: a token that
`top_k`, `top_p` or `min_p` ruled out has −inf, and the others sum to 1. vLLM keeps tokens that are as probable as the
k-th one, so a few more than k are asked for. Where even these do not sum to 1, the support is not known, and the answer
is refused: its logprobs could not be computed again.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vlmrl.types import MAX_SUPPORT, SamplingParams, Supports

TIES = 8
"""Tokens that are asked for beyond `top_k`."""

MOST_LOGPROBS = MAX_SUPPORT + TIES
"""`--max-logprobs` of the run's own servers: the most tokens that a request may ask for."""

LARGEST_LOSS = 1e-4
"""Probability that the reported tokens of a support may lack: rounding of float32, or tokens of which logprobs lose
fewer than so many nats."""


def reported(sampling: SamplingParams) -> int:
    """How many of the most probable tokens a request asks for; 0 for none.

    >>> reported(SamplingParams(8, 1.0, (2,), (), 7, top_k=5, reports_support=True)), reported(SamplingParams(8, 1.0,
    ...     (2,), (), 7, top_k=5))
    (13, 0)
    """
    if not sampling.reports_support:
        return 0
    assert 0 < sampling.top_k <= MAX_SUPPORT, f"vLLM reports no support of top_k={sampling.top_k}"
    return sampling.top_k + TIES


def supports_of(token_ids: NDArray[np.int64], logprobs: NDArray[np.float32]) -> Supports:
    """The supports of C tokens, from what vLLM reports of each: the sampled token, then the n most probable ones.

    token_ids int64 [C, 1 + n]; logprobs float [C, 1 + n], natural. Raises `ValueError` where the n tokens are not all
    of a support.

    >>> ids, chances = np.array([[7, 3, 7, 1]]), np.array([[0.25, 0.75, 0.25, 0.0]])
    >>> with np.errstate(divide="ignore"):
    ...     supports_of(ids, np.log(chances)).token_ids.tolist()
    [3, 7]
    """
    tops, chances = token_ids[:, 1:], np.exp(logprobs[:, 1:].astype(np.float64))
    is_kept = chances > 0
    lacks = (chances.sum(1) < 1 - LARGEST_LOSS) | ~((tops == token_ids[:, :1]) & is_kept).any(1)
    if lacks.any():
        first = int(lacks.argmax())
        raise ValueError(
            f"token {int(token_ids[first, 0])} was sampled from more than the {tops.shape[1]} reported tokens, "
            f"which have {chances[first].sum():.6f} of the probability: too many are as probable as the last one"
        )
    return Supports.of([np.sort(ids[kept]) for ids, kept in zip(tops, is_kept, strict=True)])
