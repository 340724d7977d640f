"""The kinds of layers that a checkpoint has, before it is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmrl.config.model import Init, ModelConfig
from vlmrl.models.checkpoints.facts import checkpoint_file

SOFTMAX_ATTENTION = "full_attention"


def stateful_layers(config: ModelConfig) -> tuple[str, ...]:
    """Kinds of the language model's layers that carry a state from token to token (`linear_attention`), sorted.

    Empty where every layer is softmax attention, and where there is no readable config.json: loading the checkpoint
    reports that. Downloads at most the config.json of a hub name. Imports no torch.
    """
    if config.tiny is not None:
        kinds = {SOFTMAX_ATTENTION}
    elif config.init is Init.random and config.size is not None:
        kinds = set(config.size.text.get("layer_types") or ())
    else:
        kinds = _kinds_of(checkpoint_file(config.name, "config.json"))
    return tuple(sorted(kinds - {SOFTMAX_ATTENTION}))


def _kinds_of(path: Path | None) -> set[str]:
    if path is None:
        return set()
    try:
        numbers: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        text = numbers.get("text_config") or numbers
        if text.get("layer_types"):
            return set(text["layer_types"])
        # Families may leave the kinds out of the file and derive them, e.g. from `full_attention_interval`.
        from transformers import AutoConfig

        derived: Any = AutoConfig.from_pretrained(path.parent, local_files_only=True)
        return set(getattr(derived.get_text_config(), "layer_types", None) or ())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return set()
