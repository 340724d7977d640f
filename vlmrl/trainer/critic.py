"""The loss of the value head, and what its values are worth.

    V: the value before a token, R: what it is to be (`returns`), V_old: V before the batch, ε: `algorithm.value.clip`

    L_V = 1/2T Σ_t max((V_t − R_t)², (V_old,t + clip(V_t − V_old,t, −ε, ε) − R_t)²)

This is the value loss of PPO2 (OpenAI Baselines), which TRL and verl have too. The larger of the two squares is taken,
so a value that has moved by more than ε towards its target gets no further gradient from this batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vlmrl.types import TrainingSample


def value_losses(values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None) -> tuple[Tensor, Tensor]:
    """(V − R)² / 2 of N tokens, the larger of the plain and the clipped one: float [N]; and bool [N]: where that is the
    clipped one.

    >>> found = value_losses(torch.tensor([0.5]), torch.tensor([0.0]), torch.tensor([1.0]), clip=0.2)
    >>> [round(float(each), 2) for each in found], found[1].dtype
    ([0.32, 1.0], torch.bool)
    """
    plain = (values - returns).square() / 2
    if clip is None:
        return plain, torch.zeros_like(plain, dtype=torch.bool)
    clipped = (old_values + (values - old_values).clamp(-clip, clip) - returns).square() / 2
    return torch.maximum(plain, clipped), clipped > plain


def value_metrics(samples: Sequence[TrainingSample]) -> dict[str, float]:
    """The values of a batch before its first optimizer step, against their targets. Empty where none are learned.

    `value/explained_variance` is 1 − Var(R − V) / Var(R): 1 for perfect values, 0 for a constant, below 0 for worse
    ones. NaN where all targets are equal.
    """
    pairs = [
        (sample.before.values, sample.returns[sample.loss_mask])
        for sample in samples
        if sample.before is not None and sample.before.values is not None and sample.returns is not None
    ]
    if len(pairs) < len(samples) or not pairs:
        return {}
    values, returns = (np.concatenate(each).astype(np.float64) for each in zip(*pairs, strict=True))
    spread = float(returns.var())
    return {
        "value/mean": float(values.mean()),
        "value/return_mean": float(returns.mean()),
        "value/explained_variance": 1.0 - float((returns - values).var()) / spread if spread else math.nan,
    }
