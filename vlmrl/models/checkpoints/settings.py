"""Values in a config.json of which no model can be made: of another type, negative, or at odds with each other.

Each says why, as the rest of the sentence "its config.json says …".
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

SIZES = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size"),
    *("n_embd", "n_layer", "n_head", "patch_size"),
)
"""Numbers of at least 1. Where a family has a list in their place, one per layer, or null, its class checks them."""

IDS = ("image_token_id", "image_token_index")
"""Token ids, of at least 0."""

REMEDY = "correct it, or download config.json again"


def unfit_values(config: Mapping[str, Any]) -> str | None:
    """Which value of a config.json cannot be; None where nothing is found.

    >>> unfit_values({"text_config": {"num_hidden_layers": -1}})  # doctest: +ELLIPSIS
    'text_config.num_hidden_layers=-1, which must be a whole number of at least 1; correct it, or ...'
    >>> unfit_values({"hidden_size": 64, "head_dim": None, "num_key_value_heads": [2, 4]})
    """
    if _has_no_language_model(config):
        return (
            "a vision_config and no text_config, so its language model would get the default sizes of its class, often "
            f"many billions of parameters; {REMEDY}"
        )
    for where in ("", "text_config", "vision_config"):
        part = config.get(where) if where else config
        if not isinstance(part, Mapping):
            continue
        for names, least in ((SIZES, 1), (IDS, 0)):
            for name in names:
                value = part.get(name)
                if value is None or isinstance(value, list):
                    continue
                if type(value) is not int or value < least:
                    return f"{_key(where, name)}={value!r}, which must be a whole number of at least {least}; {REMEDY}"
        heads, shared = part.get("num_attention_heads"), part.get("num_key_value_heads")
        if type(heads) is int and type(shared) is int and heads % shared:
            return (
                f"{_key(where, 'num_attention_heads')}={heads}, which is no multiple of num_key_value_heads={shared}, "
                f"so the heads cannot share keys; {REMEDY}"
            )
    return None


def unreadable(folder: Path, family: str) -> str | None:
    """What transformers' class for the settings of this family does not take; None where it takes all. A family that it
    does not know is no matter of values."""
    from transformers import AutoConfig
    from transformers.models.auto import configuration_auto

    families: Any = configuration_auto
    if family not in families.CONFIG_MAPPING_NAMES:
        return None
    try:
        AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # noqa: BLE001  code of any family, over a file that may hold anything
        return f"something that transformers' {family} does not take ({words_of(error)}); {REMEDY}"
    return None


def words_of(error: Exception) -> str:
    """What an error of transformers says: of one that wraps another, the inner one, in one line.

    >>> words_of(ValueError("Validation error for field 'a':\\n    TypeError: Field 'a' expected int, got str"))
    "Field 'a' expected int, got str"
    """
    last = str(error).strip().rpartition("\n")[2].strip()
    kind, found, words = last.partition("Error: ")
    said = words if found and kind.isidentifier() else last or type(error).__name__
    return said.partition(". Errors: ")[0]  # of a field of several types, one for each


def _has_no_language_model(config: Mapping[str, Any]) -> bool:
    """Whether a config.json with a vision tower says nothing of the model that reads: neither in a part of its own, nor
    next to the vision tower, as Qwen2-VL does."""
    parts = {key for key, value in config.items() if key.endswith("_config") and isinstance(value, Mapping)}
    return "vision_config" in parts and len(parts) == 1 and not any(key in config for key in SIZES)


def _key(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name
