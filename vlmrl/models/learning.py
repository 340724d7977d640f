"""What of a model learns: all of it, a part, adapters beside it."""

from __future__ import annotations

from typing import Any

from vlmrl.config.model import ModelConfig
from vlmrl.models.lora import add_adapters


def choose_what_learns(model: Any, config: ModelConfig) -> None:
    """Freeze what `config` says, in place, or add adapters. Raises `ConfigError` where no layer is of the names for
    adapters."""
    if config.lora is not None:
        add_adapters(model, config.lora)
    elif config.vlm is not None and (config.vlm.freeze_vision or config.vlm.freeze_language):
        tower = model.get_encoder(modality="image")
        if config.vlm.freeze_language:
            model.requires_grad_(False)
        tower.requires_grad_(not config.vlm.freeze_vision)
