"""The value head: what the policy expects to be paid from a state on, read off its own hidden states.

    last hidden state of the row that predicts a token [hidden] ─▶ linear layer, float32 ─▶ value before that token

It is a module of the model, so that the optimizer, the slices of sharded weights and checkpoints have it as they have
the rest, also next to LoRA adapters. It begins at zero: before the first step every value is 0. Engines, references and
exported folders do not get it (`vlmrl.models.lora.merged`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

VALUE_HEAD = "value_head"
"""The module's name in the model; the names of its weights begin with it."""


def add_value_head(model: Any, device: torch.device) -> None:
    """Add a value head of zeros to a model, in place."""
    head = nn.Linear(model.config.get_text_config().hidden_size, 1, device=device, dtype=torch.float32)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    model.add_module(VALUE_HEAD, head)


def value_head(model: Any) -> Any:
    """The value head of a model; None where it has none."""
    return getattr(model, VALUE_HEAD, None)


def is_of_value_head(name: str) -> bool:
    """Whether the weight of this name belongs to a value head."""
    return name.startswith(f"{VALUE_HEAD}.")


def values(model: Any, hidden: Tensor) -> Tensor:
    """float32 [U], with gradient, of `hidden` [U, hidden size]."""
    rows = hidden.float()
    if torch.is_grad_enabled() and not rows.requires_grad:
        # Where all below is frozen, FSDP would sum the head's gradient at the end of the backward pass on ranks without
        # an image and at once on the others, which then wait for each other: it looks whether the input has a gradient.
        rows = rows.detach().requires_grad_()
    with torch.autocast(hidden.device.type, enabled=False):
        found: Tensor = value_head(model)(rows)[:, 0]
    return found
