"""The losses of `algorithm.loss`, on the loss tokens of one micro-batch.

    LossTokens (logprobs, …, advantages) ─▶ loss ─▶ LossOutput                 objective.py adds what goes around it

Symbols: N loss tokens of the micro-batch, S samples of the whole batch, T loss tokens of the whole batch, π the policy
that is trained, μ the policy that sampled, A the advantage, r = π/μ the importance ratio of a token, sg(x) the value of
x without its gradient. Every loss is divided by sizes of the whole batch (`BatchTotals`), so the sum over micro-batches
and ranks is the batch's loss, however its samples were divided; a single sample is never divided.

Your own loss has the signature `LossFunction`, like those here, and is named by its import path:

    from vlmrl.trainer.loss import LossOutput

    def my_loss(tokens, totals, config):                       # LossTokens, BatchTotals, AlgorithmConfig
        objective = tokens.advantages * tokens.logprobs        # [N]; divide only by sizes of the whole batch
        return LossOutput(-config.args["scale"] * objective.sum() / totals.tokens)

    python -m vlmrl algorithm=my_package.my_module:my_loss algorithm.args.scale=0.5

In a run with a reference (`reference=`), `tokens.reference_logprobs` are its logprobs, for your own loss too, and with
`algorithm.distill.top_k` its most likely tokens and the policy's logprobs of them. `tokens.old_logprobs` are those of
π_old, the policy before the batch (`algorithm.epochs`, `algorithm.minibatches`).
"""

from __future__ import annotations

import functools
import inspect
import logging
import numbers
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from vlmrl.config.algorithm import AlgorithmConfig, Loss
from vlmrl.config.import_paths import assert_takes, import_named
from vlmrl.errors import ConfigError, UserFault, fenced, safe_repr, safe_text

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class LossTokens:
    """The loss tokens of one micro-batch, flat. N ≥ 1; all on one device."""

    logprobs: Tensor
    """float32 or float64 [N]; log π, natural, with gradient."""
    inference_logprobs: Tensor
    """float [N]; log μ, natural, as the sampler returned it."""
    advantages: Tensor
    """float [N]."""
    sample_index: Tensor
    """int64 [N]; the sample of the token. Equal numbers mean the same sample; the numbers themselves mean nothing."""
    entropies: Tensor
    """float [N]; entropy of π where the token was sampled, in nats, with gradient."""
    reference_logprobs: Tensor | None = None
    """float [N]; log of the reference's probability of the token, natural, without gradient. None: no reference."""
    reference_top_ids: Tensor | None = None
    """int64 [N, k]; the tokens that the reference finds most likely in the token's place, the most likely first. k is
    `algorithm.distill.top_k`; None where that is 0."""
    reference_top_logprobs: Tensor | None = None
    """float [N, k + 1]; log of the reference's probabilities of these tokens, natural, without gradient. The last
    column is the probability of all other tokens together, so the probabilities of a row sum to 1."""
    top_logprobs: Tensor | None = None
    """float [N, k + 1]; the same of π, with gradient: of the reference's tokens, and of all others together."""
    recorded_logprobs: Tensor | None = None
    """float [N]; what `old_logprobs` is in the later optimizer steps of a batch. None: this is the first one."""

    values: Tensor | None = None
    """float [N]; the value of the state before the token, in units of the reward, with gradient. None: no value head
    (`algorithm.advantage=gae`)."""
    old_values: Tensor | None = None
    """float [N]; the same before the first optimizer step on the batch, without gradient."""
    returns: Tensor | None = None
    """float [N]; what `values` are to be."""

    @property
    def old_logprobs(self) -> Tensor:
        """float [N]; log π_old, natural, without gradient. π_old is the policy before the first optimizer step on the
        batch, as the trainer computes it; in that step it is π itself."""
        return self.logprobs.detach() if self.recorded_logprobs is None else self.recorded_logprobs


@dataclass(frozen=True)
class BatchTotals:
    """Sizes of the whole batch: all micro-batches on all ranks."""

    tokens: int
    """Loss tokens, T."""
    samples: int
    """Samples, S."""
    max_new_tokens: int
    """`orchestrator.max_new_tokens`; a constant of the run."""


@dataclass(frozen=True, eq=False)
class LossOutput:
    """What a micro-batch adds to the batch's loss and to its metrics."""

    loss: Tensor
    """Scalar with gradient; the batch's loss is the sum of these over its micro-batches."""
    sums: dict[str, Tensor | float] = field(default_factory=dict)
    """Sums over the N tokens; the batch's metric is the sum over its micro-batches, divided by T.

    Keys: `clip_fraction`, `ratio/mean`; with an importance correction also `importance/cut_fraction` (tokens whose
    weight is not r), `importance/weight_mean` and `importance/weight_squared`. Scalars stay on the device: reading one
    here (`.item()`) would synchronize and leave the GPU idle."""
    maxima: dict[str, Tensor | float] = field(default_factory=dict)
    """`ratio/max`: the maximum over the N tokens; the batch's metric is the maximum of these. Stays on the device."""


LossFunction: TypeAlias = Callable[[LossTokens, BatchTotals, AlgorithmConfig], LossOutput]


def grpo(tokens: LossTokens, totals: BatchTotals, config: AlgorithmConfig) -> LossOutput:
    """GRPO, group relative policy optimization, per token, normalized by the batch's tokens.

        L = −1/T Σ_t min(r_t A_t, clip(r_t, 1 − clip_low, 1 + clip_high) A_t)

    This is the clipped objective of DeepSeekMath (arXiv 2402.03300, eq. 3) without its KL term. The paper averages each
    sample over its own length first; here every token of the batch has the same weight (DAPO, arXiv 2503.14476,
    section 3.3), and the upper clip is a separate number (section 3.1).
    """
    ratio = torch.exp(tokens.logprobs - tokens.inference_logprobs)
    objective, clipped = _clipped_objective(ratio, tokens.advantages, config)
    return LossOutput(-objective.sum() / totals.tokens, *ratio_metrics(ratio, clipped))


def ppo(tokens: LossTokens, totals: BatchTotals, config: AlgorithmConfig) -> LossOutput:
    """PPO, proximal policy optimization: the clipped objective (arXiv 1707.06347, eq. 7), per token.

        L = −1/T Σ_t min(r_t A_t, clip(r_t, 1 − clip_low, 1 + clip_high) A_t)

    The formula is that of `grpo`, with advantages from a value function (`algorithm.advantage=gae`); the paper's other
    terms, the value loss and the entropy bonus, are in objective.py.
    """
    return grpo(tokens, totals, config)


def dr_grpo(tokens: LossTokens, totals: BatchTotals, config: AlgorithmConfig) -> LossOutput:
    """GRPO done right: `grpo`, divided by a constant in place of a length.

        L = −1/(S · max_new_tokens) Σ_t min(r_t A_t, clip(r_t, 1 − clip_low, 1 + clip_high) A_t)

    arXiv 2503.20783, section 3.2. The paper's other change is `algorithm.advantage=group_centered` (no division by the
    standard deviation).
    """
    ratio = torch.exp(tokens.logprobs - tokens.inference_logprobs)
    objective, clipped = _clipped_objective(ratio, tokens.advantages, config)
    return LossOutput(-objective.sum() / (totals.samples * totals.max_new_tokens), *ratio_metrics(ratio, clipped))


def dapo(tokens: LossTokens, totals: BatchTotals, config: AlgorithmConfig) -> LossOutput:
    """DAPO, decoupled clip and dynamic sampling (arXiv 2503.14476, eq. 8).

        L = −1/T Σ_t min(r_t A_t, clip(r_t, 1 − clip_low, 1 + clip_high) A_t),   T over groups that differ in reward

    The formula is that of `grpo`. DAPO differs in which groups are in the batch
    (`algorithm.filters.zero_advantage=drop`).
    """
    return grpo(tokens, totals, config)


def rloo(tokens: LossTokens, totals: BatchTotals, config: AlgorithmConfig) -> LossOutput:
    """RLOO, REINFORCE with the leave-one-out baseline (arXiv 2402.14740), with importance ratios for the sampler.

        L = −1/S Σ_i Σ_t sg(r_it) A_it log π_it        sg: no gradient

    The baseline is part of A (`algorithm.advantage=leave_one_out`). The ratio is per token and not clipped. On-policy,
    r = 1 and the loss is plain REINFORCE.
    """
    ratio = torch.exp(tokens.logprobs.detach() - tokens.inference_logprobs)
    objective = ratio * tokens.advantages * tokens.logprobs
    return LossOutput(
        -objective.sum() / totals.samples, *ratio_metrics(ratio, torch.zeros_like(ratio, dtype=torch.bool))
    )


def gspo(tokens: LossTokens, totals: BatchTotals, config: AlgorithmConfig) -> LossOutput:
    """GSPO, group sequence policy optimization: one ratio per sample, the geometric mean of the ratios of its tokens
    (arXiv 2507.18071).

        s_i  = exp(1/|i| Σ_t (log π_it − log μ_it)),      s_it = sg(s_i) · π_it / sg(π_it)
        L    = −1/S Σ_i 1/|i| Σ_t min(s_it A_it, clip(s_it, 1 − clip_low, 1 + clip_high) A_it)

    This is the paper's GSPO-token (eq. 13 and 14). Where a sample has one advantage, value and gradient equal those of
    the sequence form (eq. 5). Where each turn has its own, a turn's advantage does not reach the tokens of other turns.
    """
    _, sample, length = torch.unique(tokens.sample_index, return_inverse=True, return_counts=True)
    length = length.to(tokens.logprobs.dtype)
    log_ratio = tokens.logprobs.detach() - tokens.inference_logprobs
    mean_log_ratio = torch.zeros_like(length).index_add_(0, sample, log_ratio) / length
    ratio = torch.exp(mean_log_ratio[sample] + tokens.logprobs - tokens.logprobs.detach())
    objective, clipped = _clipped_objective(ratio, tokens.advantages, config)
    return LossOutput(-(objective / length[sample]).sum() / totals.samples, *ratio_metrics(ratio, clipped))


def cispo(tokens: LossTokens, totals: BatchTotals, config: AlgorithmConfig) -> LossOutput:
    """CISPO, clipped importance weights: the weight is clipped, so that no token loses its gradient (MiniMax-M1,
    arXiv 2506.13585).

        L = −1/T Σ_t sg(clip(r_t, 1 − clip_low, 1 + clip_high)) A_t log π_t                         (eq. 4 and 5)

    The paper bounds the weight only from above: `algorithm.clip_low=1`.
    """
    ratio = torch.exp(tokens.logprobs.detach() - tokens.inference_logprobs)
    weight = ratio.clamp(1.0 - config.clip_low, 1.0 + config.clip_high)
    objective = weight * tokens.advantages * tokens.logprobs
    return LossOutput(-objective.sum() / totals.tokens, *ratio_metrics(ratio, weight != ratio))


LOSSES: dict[str, LossFunction] = {
    Loss.grpo: grpo,
    Loss.ppo: ppo,
    Loss.dr_grpo: dr_grpo,
    Loss.dapo: dapo,
    Loss.rloo: rloo,
    Loss.gspo: gspo,
    Loss.cispo: cispo,
}


@functools.cache
def loss_function(name: str) -> LossFunction:
    """The loss that `algorithm.loss` names: one of `LOSSES`, or a function that is imported from the user's code.

    Raises `ConfigError` where there is no such function, or where it cannot be called as a `LossFunction`.
    """
    if name in LOSSES:
        return LOSSES[name]
    function = import_named("algorithm.loss", name, "loss function", callable, inspect.isfunction)
    assert_takes("algorithm.loss", name, function, "tokens", "totals", "config")

    def checked(tokens: LossTokens, totals: BatchTotals, config: AlgorithmConfig) -> LossOutput:
        try:
            with fenced("it"):
                return _checked_output(function(tokens, totals, config), tokens)
        except UserFault as fault:
            if fault.traceback is not None:
                log.error("algorithm.loss=%s failed:\n%s", name, fault.traceback)
            raise ConfigError(
                f"algorithm.loss={name}: {fault.text}, so there is no loss to learn from: return "
                "vlmrl.trainer.loss.LossOutput(loss), whose loss is a scalar tensor made of tokens.logprobs"
            ) from fault

    return checked


def _checked_output(output: Any, tokens: LossTokens) -> LossOutput:
    """What a user's loss function returned, with all metrics as scalars on one device. Raises `UserFault`."""
    if not isinstance(output, LossOutput):
        if inspect.iscoroutine(output):
            output.close()
        raise UserFault(f"it returned {safe_repr(output)} of type {type(output).__name__}, not a LossOutput")
    loss: Any = output.loss
    if not isinstance(loss, Tensor):
        raise UserFault(f"its loss is {safe_repr(loss)} of type {type(loss).__name__}, not a tensor")
    if loss.shape != () or not loss.is_floating_point():
        raise UserFault(f"its loss has the shape {list(loss.shape)} and {loss.dtype}, and is not one float")
    if tokens.logprobs.requires_grad and not loss.requires_grad:
        raise UserFault("its loss has no gradient")
    kinds = (output.sums, output.maxima)
    return LossOutput(loss, *({_metric_name(k): _metric(k, v, loss) for k, v in kind.items()} for kind in kinds))


def _metric_name(name: Any) -> str:
    if not isinstance(name, str) or not safe_text(name) == name:
        raise UserFault(f"it returned a metric called {safe_repr(name)}, which is not valid text")
    return str.__str__(name)


def _metric(name: str, value: Any, loss: Tensor) -> Tensor | float:
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.detach().reshape(()).to(loss.device)
    if isinstance(value, numbers.Real):
        return float(value)
    raise UserFault(f"its metric {name} is {safe_repr(value)}, which is neither a number nor a scalar tensor")


def _clipped_objective(ratio: Tensor, advantages: Tensor, config: AlgorithmConfig) -> tuple[Tensor, Tensor]:
    """min(r A, clip(r) A) [N] (PPO, arXiv 1707.06347, eq. 7), and bool [N]: where clipping removes the gradient.

    With `clip_dual` c it is max(min(r A, clip(r) A), c A) where A < 0 (dual clip, arXiv 1912.09729, eq. 5).
    """
    low, high = 1.0 - config.clip_low, 1.0 + config.clip_high
    objective = torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    clipped = ((ratio > high) & (advantages > 0)) | ((ratio < low) & (advantages < 0))
    if config.clip_dual is not None:
        bound = config.clip_dual * advantages
        is_bounded = (advantages < 0) & (objective < bound)
        objective, clipped = torch.where(is_bounded, bound, objective), clipped | is_bounded
    return objective, clipped


def ratio_metrics(ratio: Tensor, clipped: Tensor) -> tuple[dict[str, Tensor | float], dict[str, Tensor | float]]:
    """`sums` and `maxima` of `LossOutput` for ratios [N] and the bool mask `clipped` [N]."""
    return {"clip_fraction": clipped.sum(), "ratio/mean": ratio.detach().sum()}, {"ratio/max": ratio.detach().max()}
