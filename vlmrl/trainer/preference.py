"""The loss of preference pairs: what a batch of pairs costs, and the weight of each token in its gradient.

    log π and log reference of both answers ─▶ h of each pair ─▶ loss, metrics
                                                   └─▶ −∂L/∂log π of each token ─▶ advantages ─▶ weighted_logprobs

Symbols: P pairs of the batch, w the better (chosen) and l the worse (rejected) answer of a pair, |y| the loss tokens of
an answer, π the policy, β `dpo.beta`, ε `dpo.label_smoothing`, α `dpo.sft_weight`.

    h = [log π(w) − log reference(w)] − [log π(l) − log reference(l)]        in nats; of sums over the answers' tokens,
                                                                              or of means (`dpo.length_normalized`)
    sigmoid   L = 1/P Σ −(1 − ε) log σ(βh) − ε log σ(−βh)        DPO: arXiv 2305.18290, eq. 7; ε: conservative DPO
    ipo       L = 1/P Σ (h − 1 / 2β)²                            arXiv 2310.12036, eq. 17
    both      + α/P Σ −log π(w) / |w|                            arXiv 2404.19733, eq. 1

The gradient of a pair is known only after both of its answers have been computed. So a step computes the logprobs of
all pairs first, without gradient. After that L is linear: its gradient is that of Σ_t A_t (−log π_t), where A_t is the
same constant for all tokens of an answer. Answers can be packed, cut into micro-batches and dealt to ranks like any
other samples. The price is one more forward pass: of the policy, next to that of the reference.

    >>> import math
    >>> one = np.log([0.5])
    >>> pairs = PairLogprobs(one, one, one, one, np.array([1]), np.array([1]))
    >>> found = preference_loss(pairs, DPOConfig(beta=0.1))
    >>> found.loss == math.log(2), found.chosen_weights, found.rejected_weights
    (True, array([0.05]), array([-0.05]))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from vlmrl.config.algorithm import AlgorithmConfig
from vlmrl.config.dpo import DPOConfig, PreferenceLoss
from vlmrl.trainer.loss import BatchTotals, LossOutput, LossTokens
from vlmrl.types import IntArray

Doubles: TypeAlias = NDArray[np.float64]

WEIGHTED_LOGPROBS = "vlmrl.trainer.preference:weighted_logprobs"
"""`algorithm.loss` of the trainer in mode=dpo."""


@dataclass(frozen=True, eq=False)
class PairLogprobs:
    """What both models say of P ≥ 1 pairs. Natural logs, summed over the loss tokens of an answer."""

    chosen: Doubles
    """float64 [P]; log π(w)."""
    rejected: Doubles
    """float64 [P]; log π(l)."""
    reference_chosen: Doubles
    """float64 [P]; log reference(w)."""
    reference_rejected: Doubles
    """float64 [P]; log reference(l)."""
    chosen_tokens: IntArray
    """int64 [P]; |w| ≥ 1."""
    rejected_tokens: IntArray
    """int64 [P]; |l| ≥ 1."""


@dataclass(frozen=True, eq=False)
class PairLoss:
    """What P pairs cost."""

    loss: float
    chosen_weights: Doubles
    """float64 [P]; −∂L/∂log π of every token of the better answer."""
    rejected_weights: Doubles
    """float64 [P]; the same of the worse one."""
    metrics: dict[str, float]
    """Means over the pairs: `accuracy` (pairs with h > 0; those with h = 0 count half), `margin`, `chosen_reward`,
    `rejected_reward` (implicit rewards, β (log π − log reference)), `chosen_logprob`, `rejected_logprob` (nats per
    answer)."""


def preference_loss(pairs: PairLogprobs, config: DPOConfig) -> PairLoss:
    """The loss of a batch of pairs, as at the top of this file."""
    count, beta = len(pairs.chosen), config.beta
    share_w, share_l = np.ones(count), np.ones(count)
    if config.length_normalized:
        share_w, share_l = 1 / pairs.chosen_tokens, 1 / pairs.rejected_tokens
    chosen_reward = beta * share_w * (pairs.chosen - pairs.reference_chosen)
    rejected_reward = beta * share_l * (pairs.rejected - pairs.reference_rejected)
    margin = chosen_reward - rejected_reward  # βh
    match config.loss:
        case PreferenceLoss.sigmoid:
            smoothing = config.label_smoothing
            losses = (1 - smoothing) * np.logaddexp(0, -margin) + smoothing * np.logaddexp(0, margin)
            slope = beta * (sigmoid(margin) - (1 - smoothing))  # ∂L/∂h
        case PreferenceLoss.ipo:
            excess = margin / beta - 1 / (2 * beta)
            losses, slope = excess**2, 2 * excess
    own = config.sft_weight / pairs.chosen_tokens
    losses = losses - own * pairs.chosen
    return PairLoss(
        loss=float(losses.mean()),
        chosen_weights=(own - slope * share_w) / count,
        rejected_weights=slope * share_l / count,
        metrics={
            "accuracy": float(np.where(margin == 0, 0.5, margin > 0).mean()),
            "margin": float(margin.mean()),
            "chosen_reward": float(chosen_reward.mean()),
            "rejected_reward": float(rejected_reward.mean()),
            "chosen_logprob": float(pairs.chosen.mean()),
            "rejected_logprob": float(pairs.rejected.mean()),
        },
    )


def sigmoid(x: Doubles) -> Doubles:
    """1 / (1 + exp(−x)), without an overflow.

    >>> sigmoid(np.array([-1e4, 0.0, 1e4]))
    array([0. , 0.5, 1. ])
    """
    return np.exp(-np.logaddexp(0, -x))


def weighted_logprobs(tokens: LossTokens, totals: BatchTotals, config: AlgorithmConfig) -> LossOutput:
    """−Σ_t A_t log π_t, where A are the advantages: a loss with a known gradient."""
    return LossOutput(-(tokens.advantages * tokens.logprobs).sum())
