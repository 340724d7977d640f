"""What a micro-batch is learned by: the loss under its importance correction, and the terms beside it.

    LossTokens ─▶ importance correction ─▶ loss ─▶ entropy bonus ─▶ distances to the reference ─▶ value ─▶ LossOutput

Symbols: those of loss.py.

PPO's ratio is taken against the policy that collected the data (arXiv 1707.06347, section 3). Here two policies have a
claim to that: μ, which sampled, and π_old, the trainer's policy before the first optimizer step on the batch. They
differ by staleness and by the rounding of the engine. `algorithm.importance_correction` chooses, in the same way for
every loss. w is a weight on the token's advantage, without gradient, and m = π_old/μ:

    own          the ratio in the loss is r = π/μ, and its clip is the only correction
    truncated    w = min(m, C)                        the ratio in the loss is π/π_old, and its clip bounds how far
    masked       w = m if 1/C ≤ m ≤ C else 0          the optimizer steps on the batch lead; in the first of them it
    none         w = 1                                is 1 in value. C is `importance_cap`

The last three are decoupled PPO, which splits the ratio into π/π_old and π_old/μ (arXiv 2110.00641; AReaL, arXiv
2505.24298). Truncating the second factor is truncated importance sampling (Yao et al., 2025); masking it is IcePop
(arXiv 2510.18855).

    m = 0.3  1.0  1.7  5.0,  C = 2:    truncated w = 0.3  1.0  1.7  2.0    masked w = 0  1.0  1.7  0    none w = 1 1 1 1
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from vlmrl.config.algorithm import AlgorithmConfig, ImportanceCorrection, KLEstimator
from vlmrl.trainer.critic import value_losses
from vlmrl.trainer.distill import divergence
from vlmrl.trainer.loss import BatchTotals, LossOutput, LossTokens, loss_function, ratio_metrics


def policy_loss(tokens: LossTokens, totals: BatchTotals, config: AlgorithmConfig) -> LossOutput:
    """The loss `algorithm.loss` under `algorithm.importance_correction` (see the table at the top of this file), minus
    the entropy bonus, plus the distance to the reference, the divergence from it and the loss of the value head:

        L − β/T Σ_t H_t + κ/T Σ_t k_t + ω/T Σ_t D_t + c L_V

        H_t: entropy of π where token t was sampled, β: `algorithm.entropy_coef`
        k_t: `reference_kl` of token t, by the estimator `algorithm.kl.estimator`, κ: `algorithm.kl.loss`
        D_t: `divergence` at token t (distill.py), ω: `algorithm.distill.weight`
        L_V: a mean over the tokens (critic.py) with `algorithm.advantage=gae`, c: `algorithm.value.coef`

    The bonus is that of A3C (arXiv 1602.01783, end of section 4), the distance that of GRPO (arXiv 2402.03300, eq. 3).
    All are means over the batch's tokens, whatever the loss divides by, so that β, κ and ω mean the same with every
    loss: how much advantage a nat is worth.
    """
    output = _corrected_loss(tokens, totals, config)
    loss = output.loss
    if config.entropy_coef != 0:
        loss = loss - config.entropy_coef * tokens.entropies.sum() / totals.tokens
    if config.kl.loss != 0:
        assert tokens.reference_logprobs is not None, "preflight refuses algorithm.kl without a reference"
        distance = reference_kl(tokens.logprobs, tokens.reference_logprobs, config.kl.estimator)
        loss = loss + config.kl.loss * distance.sum() / totals.tokens
    sums = output.sums
    if tokens.reference_top_logprobs is not None:
        assert tokens.top_logprobs is not None
        divergences = divergence(tokens.reference_top_logprobs, tokens.top_logprobs, config.distill)
        if config.distill.weight != 0:
            loss = loss + config.distill.weight * divergences.sum() / totals.tokens
        in_tail = tokens.reference_top_logprobs[:, -1].exp()
        sums = sums | {"distill/divergence": divergences.detach().sum(), "distill/tail": in_tail.sum()}
    if tokens.values is not None:
        assert tokens.old_values is not None
        assert tokens.returns is not None
        losses, clipped = value_losses(tokens.values, tokens.old_values, tokens.returns, config.value.clip)
        loss = loss + config.value.coef * losses.sum() / totals.tokens
        sums = sums | {"value/loss": losses.detach().sum(), "value/clip_fraction": clipped.sum()}
    return replace(output, loss=loss, sums=sums)


def reference_kl(logprobs: Tensor, reference_logprobs: Tensor, estimator: KLEstimator) -> Tensor:
    """KL(π ‖ reference), estimated from each of N tokens that π sampled: float [N], in nats (`KLEstimator`).

    >>> pi, reference = torch.tensor([0.5]).log(), torch.tensor([0.25]).log()
    >>> [round(float(reference_kl(pi, reference, each)), 4) for each in KLEstimator]
    [0.6931, 0.2402, 0.1931]
    """
    d = reference_logprobs - logprobs
    match estimator:
        case KLEstimator.k1:
            return -d
        case KLEstimator.k2:
            return d.square() / 2
        case KLEstimator.k3:
            return torch.expm1(d) - d


def _corrected_loss(tokens: LossTokens, totals: BatchTotals, config: AlgorithmConfig) -> LossOutput:
    loss = loss_function(config.loss)
    if config.importance_correction is ImportanceCorrection.own:
        return loss(tokens, totals, config)
    old = tokens.old_logprobs
    mismatch = torch.exp(old - tokens.inference_logprobs)
    weight = importance_weight(mismatch, config)
    output = loss(replace(tokens, inference_logprobs=old, advantages=tokens.advantages * weight), totals, config)
    ratio = torch.exp(tokens.logprobs.detach() - tokens.inference_logprobs)
    sums, maxima = ratio_metrics(ratio, torch.zeros_like(ratio, dtype=torch.bool))
    sums = {
        **output.sums,
        **sums,
        "clip_fraction": output.sums.get("clip_fraction", 0.0),
        "importance/cut_fraction": (weight != mismatch).sum(),
        "importance/weight_mean": weight.sum(),
        "importance/weight_squared": weight.square().sum(),
    }
    return LossOutput(output.loss, sums, output.maxima | maxima)


def importance_weight(ratio: Tensor, config: AlgorithmConfig) -> Tensor:
    """The weight of each token, float [N] ≥ 0, from its ratio π_old/μ.

    >>> masked = AlgorithmConfig(importance_correction=ImportanceCorrection.masked, importance_cap=2.0)
    >>> importance_weight(torch.tensor([0.25, 1.0, 1.5, 8.0]), masked)
    tensor([0.0000, 1.0000, 1.5000, 0.0000])
    """
    cap = config.importance_cap
    match config.importance_correction:
        case ImportanceCorrection.truncated:
            return ratio.clamp_max(cap)
        case ImportanceCorrection.masked:
            return torch.where((ratio >= 1 / cap) & (ratio <= cap), ratio, 0.0)
        case ImportanceCorrection.none:
            return torch.ones_like(ratio)
        case ImportanceCorrection.own:
            raise AssertionError("with this setting the loss uses its own ratio, and no weight")


def loss_metrics(sums: Mapping[str, float], maxima: Mapping[str, float], tokens: int) -> dict[str, float]:
    """The batch's metrics, from `sums` and `maxima` combined over its micro-batches. `tokens`: T.

    `importance/ess` is the effective sample size divided by the number of tokens, (Σ w)² / (T Σ w²), in (0, 1]
    (Kish, 1965).

    >>> loss_metrics({"importance/weight_mean": 3.0, "importance/weight_squared": 5.0}, {}, tokens=2)
    {'importance/weight_mean': 1.5, 'importance/ess': 0.9}
    """
    metrics = {key: value / tokens for key, value in sums.items()}
    squared = metrics.pop("importance/weight_squared", None)
    if squared is not None:
        metrics["importance/ess"] = metrics["importance/weight_mean"] ** 2 / squared if squared else 0.0
    return metrics | dict(maxima)


def supervised(logprobs: Tensor, total_tokens: int) -> Tensor:
    """Negative log-likelihood per token: −1/T Σ_t log π_t, in nats; a scalar. `logprobs` [N] are of one micro-batch,
    `total_tokens` is T, the loss tokens of the whole batch.

    >>> supervised(torch.tensor([0.5, 0.25]).log(), total_tokens=2)
    tensor(1.0397)
    """
    return -logprobs.sum() / total_tokens


def mismatch_kl(trainer_logprobs: Tensor, inference_logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and maximum over N ≥ 1 tokens of r − log r − 1, where log r = trainer − inference logprob. In nats, never
    negative. Scalars, float64.

    This is the k3 estimator of KL(sampler ‖ trainer) (Schulman, "Approximating KL Divergence", 2020). It is computed in
    float64 and as expm1(log r) − log r, because it has to resolve differences that a float32 subtraction rounds to 0.

    >>> total, largest = mismatch_kl(torch.tensor([-1.0, -1.0]), torch.tensor([-1.0, -1.5]))
    >>> round(float(total), 6), round(float(largest), 6)
    (0.148721, 0.148721)
    """
    log_ratio = trainer_logprobs.detach().double() - inference_logprobs.double()
    # Rounding may turn a zero into −1e-33.
    k3 = (torch.expm1(log_ratio) - log_ratio).clamp_min(0.0)
    return k3.sum(), k3.max()
