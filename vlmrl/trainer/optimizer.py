"""AdamW and its learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlmrl.config.trainer import Decay, Optimizer, TrainerConfig


def learning_rate(config: TrainerConfig, step: int) -> float:
    """Learning rate of RL step `step` (0-based): linear warm-up, then the chosen decay to `min_lr_ratio`.

    >>> config = TrainerConfig(max_steps=100, learning_rate=1.0, decay=Decay.linear, min_lr_ratio=0.0)
    >>> [round(learning_rate(config, step), 2) for step in (0, 50, 99)]
    [1.0, 0.5, 0.01]
    """
    if step < config.lr_warmup_steps:
        return config.learning_rate * (step + 1) / config.lr_warmup_steps
    progress = min(1.0, (step - config.lr_warmup_steps) / max(1, config.max_steps - config.lr_warmup_steps))
    floor = config.min_lr_ratio
    share = {
        Decay.constant: 1.0,
        Decay.linear: 1.0 - (1.0 - floor) * progress,
        Decay.cosine: floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[config.decay]
    return config.learning_rate * share


def make_optimizer(config: TrainerConfig, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    """Of `trainer.optimizer`, over float32 tensors."""
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": config.betas,
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    if config.optimizer is Optimizer.adamw:
        return torch.optim.AdamW(parameters, **settings, fused=True)
    from torchao.optim import AdamW8bit

    optimizer: torch.optim.Optimizer = AdamW8bit(parameters, **settings)
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """For the next step."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # torchao's, which would be compiled anew for another number
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
