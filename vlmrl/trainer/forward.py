"""One forward pass over a micro-batch: images, rows, head."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmrl.models.policy import Policy
from vlmrl.trainer.packing import MicroBatch


def loss_logprobs(policy: Policy, batch: MicroBatch, temperature: float) -> tuple[Tensor, Tensor]:
    """float32 [N] logprobs of the loss tokens, with gradient; float32 [U] entropies of their distributions, without."""
    # The tower comes first in every pass, or the ranks would gather its weights and the layers' in different orders.
    idle = policy.encode_images([] if batch.idle_image is None else [batch.idle_image])
    features = policy.encode_images(batch.images)
    hidden = policy.hidden_states(
        batch.token_ids, batch.position_ids, batch.mm_token_type_ids, batch.plan, features, batch.feature_rows
    )
    logprobs, entropies = policy.token_logprobs(
        hidden.index_select(0, batch.loss_rows), batch.entry, batch.targets, temperature
    )
    if idle is not None:
        logprobs = logprobs + 0.0 * torch.stack([level.float().sum() for level in idle.levels]).sum()
    return logprobs, entropies
