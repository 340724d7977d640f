"""AdamW, its learning rate, and the loss scale that lets float16 hold gradients.

Loss scaling is from Micikevicius et al., 2018, arXiv 1710.03740, section 3.2. float16 has three bits of mantissa more
than bfloat16, so the logprobs of sampler and trainer differ eight times less (mismatch_kl of 4.6e-4 where bfloat16 has
3.1e-2: benchmarks/README.md). But float16 holds nothing below 6e-8, and most gradients are smaller. So the loss is
multiplied by a factor before its backward pass, as large as the largest gradient allows, and the float32 sum of the
gradients is divided by it again. Where a gradient overflows nevertheless, the step is computed again with half the
factor, so no batch is lost.

Loss scaling does not help the forward pass: activations above 65504 are infinite in float16, and a model that has them
needs bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vlmrl.config.model import Part
from vlmrl.config.trainer import Decay, Optimizer, TrainerConfig
from vlmrl.trainer.averages import DECAY, follow_step

FIRST_LOSS_SCALE = 2**16
LARGEST_LOSS_SCALE = 2**24
LOSS_SCALE_GROWTH_STEPS = 50
"""Optimizer steps without an overflow after which the factor is doubled. RL makes hundreds of steps, not millions."""


def learning_rate(config: TrainerConfig, step: int, steps: float | None = None) -> float:
    """Learning rate of RL step `step` (0-based) of `steps`, by default `config.max_steps`: linear warm-up, then the
    chosen decay to `min_lr_ratio`.

    >>> config = TrainerConfig(max_steps=100, learning_rate=1.0, decay=Decay.linear, min_lr_ratio=0.0)
    >>> [round(learning_rate(config, step), 2) for step in (0, 50, 99)]
    [1.0, 0.5, 0.01]
    """
    if step < config.lr_warmup_steps:
        return config.learning_rate * (step + 1) / config.lr_warmup_steps
    last = config.max_steps if steps is None else steps
    progress = min(1.0, (step - config.lr_warmup_steps) / max(1, last - config.lr_warmup_steps))
    decayed = max(0.0, 1.0 - (1.0 - progress) / config.decay_share)  # of the part of `wsd` that decays
    floor = config.min_lr_ratio
    share = {
        Decay.constant: 1.0,
        Decay.linear: 1.0 - (1.0 - floor) * progress,
        Decay.cosine: floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress)),
        Decay.wsd: floor + (1.0 - floor) * (1.0 - math.sqrt(decayed)),
    }[config.decay]
    return config.learning_rate * share


FACTOR = "factor"
"""The key of an optimizer's group of weights that holds the group's factor of the learning rate."""


def make_optimizer(
    config: TrainerConfig, parameters: Mapping[str, Tensor], part_of: Mapping[str, Part] | None = None
) -> torch.optim.Optimizer:
    """Build the optimizer that `trainer.optimizer` names, over float32 parameters by name. Weight decay leaves out
    biases and the scales of norms (one dimension), as Hugging Face's Trainer does: a decayed scale shrinks a whole
    layer. `part_of` says to which part of the model each parameter belongs, for `trainer.part_rates`; a name that it
    lacks is learned at the learning rate itself."""
    settings: dict[str, Any] = {"lr": config.learning_rate, "betas": config.betas, "eps": config.eps}
    members: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in parameters.items():
        part = (part_of or {}).get(name)
        factor = 1.0 if part is None else getattr(config.part_rates, part.value)
        decay = config.weight_decay if parameter.ndim > 1 else 0.0
        members.setdefault((factor, decay), []).append(parameter)
    groups: list[dict[str, Any]] = [
        {
            "params": of_group,
            "weight_decay": decay,
            "lr": config.learning_rate * factor,
            FACTOR: factor,
            DECAY: config.ema,
        }
        for (factor, decay), of_group in members.items()
    ]
    optimizer: torch.optim.Optimizer
    if config.optimizer is Optimizer.adamw:
        optimizer = torch.optim.AdamW(groups, **settings, fused=True)
    else:
        from torchao.optim import AdamW8bit

        optimizer = AdamW8bit(groups, **settings)
    if config.ema is not None:
        optimizer.register_step_post_hook(follow_step)
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of the next step; a group of weights with a factor of its own gets it times that."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # torchao recompiles its step for every new Python number
            group["lr"].fill_(rate * group[FACTOR])
        else:
            group["lr"] = rate * group[FACTOR]


class LossScale:
    """The factor that the loss is multiplied by; always 1 for dtypes with the exponent range of float32.

    >>> scale = LossScale(torch.float16)
    >>> scale.factor, scale.shrink(), scale.factor
    (65536, True, 32768)
    >>> LossScale(torch.bfloat16).shrink()
    False
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._is_needed = dtype == torch.float16
        self.factor = FIRST_LOSS_SCALE if self._is_needed else 1
        self._kept = 0
        """Steps since the factor last changed."""

    def shrink(self) -> bool:
        """Halve the factor after a gradient overflowed → False where it is 1 already and cannot shrink."""
        if self.factor == 1:
            return False
        self.factor //= 2
        self._kept = 0
        return True

    def keep(self) -> None:
        """Count a step whose gradient was finite, and double the factor after `LOSS_SCALE_GROWTH_STEPS` of them."""
        self._kept += 1
        if self._is_needed and self._kept >= LOSS_SCALE_GROWTH_STEPS and self.factor < LARGEST_LOSS_SCALE:
            self.factor *= 2
            self._kept = 0

    @property
    def state(self) -> dict[str, int]:
        """What a checkpoint stores."""
        return {"loss_scale": self.factor, "loss_scale_kept": self._kept}

    @state.setter
    def state(self, state: dict[str, int]) -> None:
        if self._is_needed:  # a run in another dtype may have written the checkpoint
            self.factor, self._kept = state["loss_scale"], state["loss_scale_kept"]
