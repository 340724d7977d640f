"""Distillation of whole distributions: how far the policy is from its teacher, token by token.

A teacher q and the policy π are compared where the policy sampled, at the k tokens that the teacher finds most likely
there, with all other tokens as one more outcome, the tail (`algorithm.distill`). Merging tokens never makes a
divergence larger (the data processing inequality), so it is at most that of the whole distributions, and equals it
where k is the whole vocabulary. Renormalizing both over the k tokens instead would ignore how much probability the
policy leaves to them.

    forward            KL(q ‖ π) = Σ q (log q − log π)        covers what the teacher does     arXiv 1503.02531
    reverse            KL(π ‖ q) = Σ π (log π − log q)        leaves out what it would not     MiniLLM, arXiv 2306.08543
    jensen_shannon     β KL(q ‖ m) + (1 − β) KL(π ‖ m),  m = β q + (1 − β) π                   GKD, arXiv 2306.13649

As in GKD, no gradient goes through which tokens were sampled.
"""

from __future__ import annotations

import math

from torch import Tensor

from vlmrl.config.algorithm import DistillConfig, Divergence


def divergence(teacher: Tensor, policy: Tensor, config: DistillConfig) -> Tensor:
    """The divergence of each of N tokens, float [N] ≥ 0 up to rounding, in nats. `teacher` and `policy` are natural-log
    probabilities of the same k + 1 outcomes, float [N, k + 1] each; none is −inf.

    >>> import torch
    >>> teacher, policy = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    >>> [round(float(divergence(teacher, policy, DistillConfig(divergence=each))), 4) for each in Divergence]
    [0.1438, 0.1308, 0.0338]
    """
    match config.divergence:
        case Divergence.forward:
            return _kl(teacher, policy)
        case Divergence.reverse:
            return _kl(policy, teacher)
        case Divergence.jensen_shannon:
            beta = config.beta
            mixture = (teacher + math.log(beta)).logaddexp(policy + math.log1p(-beta))
            return beta * _kl(teacher, mixture) + (1 - beta) * _kl(policy, mixture)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p ‖ q) = Σ p (log p − log q) from logprobs [N, outcomes] → [N].

    Both sums Σ p and Σ q are 1. Their difference is written out, so that the gradient of each outcome is exactly 0
    where the two agree; otherwise the rounding of the sums would be a gradient."""
    return (p.exp() * (p - q) - p.exp() + q.exp()).sum(-1)
