"""Moving averages of weights: the policy's own (`trainer.ema`), and those of a reference (`reference=ema`).

    after each optimizer step:  average ─▶ decay × average + (1 − decay) × weight

The policy's averages are float32 and lie in the optimizer's state, next to AdamW's: on the same device, divided among
the ranks in the same way, and in the same files of a checkpoint. The average of a weight begins as the weight after its
first step; one without averages has never changed.

The policy itself does not see them: it samples, is evaluated and learns with its own weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

AVERAGE = "ema"
"""The name of the average in the optimizer's state and in a checkpoint (`ema/<weight>`)."""

DECAY = "ema_decay"
"""The key of an optimizer's group of weights that holds `trainer.ema`."""


def move(average: Tensor, weight: Tensor, share: float) -> None:
    """Move `average` by a share of its way to `weight`, in its own number format and place."""
    if share == 1.0:
        average.copy_(weight)
    else:
        average.lerp_(weight.to(average.device, average.dtype), share)


@torch.no_grad()
def follow_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Let the averages follow a step that `optimizer` has made; a hook of it."""
    for group in optimizer.param_groups:
        for weight in group["params"]:
            state = optimizer.state.get(weight)
            if not state:
                continue  # it has had no gradient yet
            if AVERAGE not in state:
                state[AVERAGE] = weight.detach().clone()
            else:
                move(local(state[AVERAGE]), local(weight), 1.0 - group[DECAY])


def local(tensor: Tensor) -> Tensor:
    """This rank's slice, without gradient."""
    found: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return found.detach()
