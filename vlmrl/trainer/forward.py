"""One forward pass over a micro-batch, up to the scores of its loss tokens.

    encode images ─▶ hidden states of all rows ─▶ the rows with a loss ─▶ logprobs, entropies, top tokens, values

`temperature` is everywhere the run's, for tokens that have none of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmrl.models.policy import Policy
from vlmrl.models.value_head import values
from vlmrl.trainer.loss import LossTokens
from vlmrl.trainer.packing import MicroBatch


def loss_logprobs(policy: Policy, batch: MicroBatch, temperature: float) -> tuple[Tensor, Tensor]:
    """float32 [N] logprobs of the loss tokens, and float32 [N] entropies (nats) of the distributions they were sampled
    from, both with gradient."""
    hidden, divisor, unused = _loss_hidden(policy, batch, temperature)
    logprobs, entropies = _token_logprobs(policy, batch, hidden, divisor)
    return logprobs + unused, entropies


@dataclass(frozen=True, eq=False)
class PolicyScores:
    """What the policy that learns says about the N loss tokens of a micro-batch, with gradient."""

    logprobs: Tensor
    """float32 [N]; as those of `loss_logprobs`."""
    entropies: Tensor
    """float32 [N]; nats."""
    top_logprobs: Tensor | None = None
    """float32 [N, k + 1]; of the batch's `reference_top_ids` and of all other tokens together, where the batch has
    them. These are of the whole distribution, also where the tokens have supports."""
    values: Tensor | None = None
    """float32 [N]; the value before each token, where values are learned."""

    @property
    def zero(self) -> Tensor:
        """A scalar 0 whose gradient, which is zero, reaches all that a loss of these tokens would reach."""
        values = 0.0 if self.values is None else self.values.sum()
        return 0.0 * (self.logprobs.sum() + values)

    def loss_tokens(self, batch: MicroBatch) -> LossTokens:
        """Together with what the micro-batch brings."""
        return LossTokens(
            logprobs=self.logprobs,
            inference_logprobs=batch.inference_logprobs,
            advantages=batch.advantages,
            sample_index=batch.sample_index,
            entropies=self.entropies,
            reference_logprobs=batch.reference_logprobs,
            recorded_logprobs=batch.old_logprobs,
            reference_top_ids=_of_tokens(batch.reference_top_ids, batch),
            reference_top_logprobs=_of_tokens(batch.reference_top_logprobs, batch),
            top_logprobs=self.top_logprobs,
            values=self.values,
            old_values=batch.old_values,
            returns=batch.returns,
        )


def policy_scores(policy: Policy, batch: MicroBatch, temperature: float, *, with_values: bool) -> PolicyScores:
    """All that the loss reads of the policy that learns, from one forward pass."""
    hidden, divisor, unused = _loss_hidden(policy, batch, temperature)
    top = None
    if batch.reference_top_ids is None:
        logprobs, entropies = _token_logprobs(policy, batch, hidden, divisor)
    else:
        logprobs, of_rows, top = policy.token_and_top_logprobs(
            hidden, batch.entry, batch.targets, divisor, batch.reference_top_ids
        )
        entropies = of_rows[batch.entry]
        if batch.supports is not None:
            logprobs, entropies = policy.support_logprobs(hidden, batch.entry, batch.targets, divisor, batch.supports)
    found = values(policy.model, hidden)[batch.entry] if with_values else None
    return PolicyScores(logprobs + unused, entropies, _of_tokens(top, batch), found)


def scores_without_gradient(
    policy: Policy, batch: MicroBatch, temperature: float, k: int
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """float32 [N] logprobs of the loss tokens. With k > 0 also int64 [U, k], the most likely tokens of each row, and
    float32 [U, k + 1], their logprobs and that of all other tokens together, of the whole distribution."""
    hidden, divisor, unused = _loss_hidden(policy, batch, temperature)
    logprobs, top = policy.most_likely(hidden, batch.entry, batch.targets, divisor, k)
    if batch.supports is not None:
        logprobs, _ = policy.support_logprobs(hidden, batch.entry, batch.targets, divisor, batch.supports)
    return logprobs + unused, top


def _token_logprobs(
    policy: Policy, batch: MicroBatch, hidden: Tensor, divisor: float | Tensor
) -> tuple[Tensor, Tensor]:
    """float32 [N] each: logprobs and entropies of the loss tokens, from the hidden states of their rows."""
    if batch.supports is not None:
        return policy.support_logprobs(hidden, batch.entry, batch.targets, divisor, batch.supports)
    logprobs, of_rows = policy.token_logprobs(hidden, batch.entry, batch.targets, divisor)
    return logprobs, of_rows[batch.entry]


def _of_tokens(of_rows: Tensor | None, batch: MicroBatch) -> Tensor | None:
    """[U, …] → [N, …]: of each loss token, what its row has."""
    return None if of_rows is None else of_rows[batch.entry]


def _loss_hidden(
    policy: Policy, batch: MicroBatch, temperature: float
) -> tuple[Tensor, float | Tensor, float | Tensor]:
    """Hidden states [U, hidden size] of the rows with a loss; their temperature, one number or float32 [U]; and a zero
    that depends on what the batch's `idle_items` computed."""
    # The vision tower runs first in every pass. Otherwise the ranks of a sharded model would gather the weights of the
    # tower and of the layers in different orders.
    idle = [policy.encode_items([item]) for item in batch.idle_items]
    features = policy.encode_items(batch.mm_items)
    divisor: float | Tensor = temperature
    if batch.temperatures is not None:
        divisor = torch.where(batch.temperatures.isnan(), temperature, batch.temperatures)
    hidden = policy.hidden_states(
        batch.token_ids, batch.position_ids, batch.mm_token_type_ids, batch.plan, features, batch.feature_rows
    )
    unused = [level.float().sum() for features in idle if features is not None for level in features.levels]
    return hidden.index_select(0, batch.loss_rows), divisor, 0.0 * torch.stack(unused).sum() if unused else 0.0
