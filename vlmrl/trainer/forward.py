"""One forward pass over a micro-batch: images, rows, head."""

from __future__ import annotations

from torch import Tensor

from vlmrl.models.policy import Policy
from vlmrl.trainer.packing import MicroBatch


def loss_logprobs(policy: Policy, batch: MicroBatch, temperature: float) -> tuple[Tensor, Tensor]:
    """float32 [N] logprobs of the loss tokens, with gradient; float32 [U] entropies of their distributions, without."""
    features = policy.encode_images(batch.images)
    hidden = policy.hidden_states(
        batch.token_ids, batch.position_ids, batch.mm_token_type_ids, batch.plan, features, batch.feature_rows
    )
    return policy.token_logprobs(hidden.index_select(0, batch.loss_rows), batch.entry, batch.targets, temperature)
