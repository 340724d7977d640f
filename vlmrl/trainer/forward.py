"""One forward pass over a micro-batch, up to the scores of its loss tokens.

    encode images ─▶ hidden states of all rows ─▶ the rows with a loss ─▶ logprobs, entropies, top tokens

`temperature` is everywhere the run's, for tokens that have none of their own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlmrl.models.policy import Policy
from vlmrl.trainer.packing import MicroBatch


def loss_logprobs(policy: Policy, batch: MicroBatch, temperature: float) -> tuple[Tensor, Tensor]:
    """float32 [N] logprobs of the loss tokens, and float32 [N] entropies (nats) of the distributions they were sampled
    from, both with gradient."""
    hidden, divisor, unused = _loss_hidden(policy, batch, temperature)
    if batch.supports is not None:
        logprobs, entropies = policy.support_logprobs(hidden, batch.entry, batch.targets, divisor, batch.supports)
        return logprobs + unused, entropies
    logprobs, of_rows = policy.token_logprobs(hidden, batch.entry, batch.targets, divisor)
    return logprobs + unused, of_rows[batch.entry]


def loss_and_top_logprobs(policy: Policy, batch: MicroBatch, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """As `loss_logprobs`, and float32 [U, k + 1] with gradient: the logprobs of the batch's `reference_top_ids` and of
    all other tokens together. These are of the whole distribution, also where the tokens have supports."""
    assert batch.reference_top_ids is not None
    hidden, divisor, unused = _loss_hidden(policy, batch, temperature)
    logprobs, of_rows, top = policy.token_and_top_logprobs(
        hidden, batch.entry, batch.targets, divisor, batch.reference_top_ids
    )
    if batch.supports is not None:
        logprobs, entropies = policy.support_logprobs(hidden, batch.entry, batch.targets, divisor, batch.supports)
        return logprobs + unused, entropies, top
    return logprobs + unused, of_rows[batch.entry], top


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


def _loss_hidden(
    policy: Policy, batch: MicroBatch, temperature: float
) -> tuple[Tensor, float | Tensor, float | Tensor]:
    """Hidden states [U, hidden size] of the rows with a loss; their temperature, one number or float32 [U]; and a zero
    that depends on what the batch's `idle_images` computed."""
    # The vision tower runs first in every pass. Otherwise the ranks of a sharded model would gather the weights of the
    # tower and of the layers in different orders.
    idle = [policy.encode_images([image]) for image in batch.idle_images]
    features = policy.encode_images(batch.images)
    divisor: float | Tensor = temperature
    if batch.temperatures is not None:
        divisor = torch.where(batch.temperatures.isnan(), temperature, batch.temperatures)
    hidden = policy.hidden_states(
        batch.token_ids, batch.position_ids, batch.mm_token_type_ids, batch.plan, features, batch.feature_rows
    )
    unused = [level.float().sum() for features in idle if features is not None for level in features.levels]
    return hidden.index_select(0, batch.loss_rows), divisor, 0.0 * torch.stack(unused).sum() if unused else 0.0
