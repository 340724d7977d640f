"""Architectures that the policy does not compute, told from config.json before anything is loaded.

    unfit_config(config.json)   what a glance at the file shows: quantized weights, an encoder, cross attention, ALiBi …
    unfit_class(folder)         what transformers says of an architecture that no file of conf/model/vlm names: whether
                                it has the class, whether that is a language model, and how its layers mask attention

Both say why, as the rest of the sentence "model.name=… ". What only the weights show, `models/trial.py` finds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vlmrl.errors import ModelError, headline
from vlmrl.models.checkpoints.settings import unfit_values, unreadable, words_of

SEEING = ("image_token_id", "image_token_index", "vq_config", "img_processor", "mm_vision_tower", "vision_config")
"""Keys of config.json that only models with images have."""

CHANGING_ROPES = ("dynamic", "longrope")
"""Rotary embeddings whose frequencies change once a sequence is longer than the model was first trained on."""


def unfit_config(config: Mapping[str, Any]) -> str | None:
    """Why the policy cannot compute with the model of this config.json; None where nothing in the file speaks against
    it.

    >>> unfit_config({"model_type": "t5gemma", "is_encoder_decoder": True})[:50]
    'is_encoder_decoder=true: an encoder reads the prom'
    >>> unfit_config({"model_type": "llama", "quantization_config": None})
    """
    quantized = config.get("quantization_config") or config.get("compression_config")
    if quantized:
        method = quantized.get("quant_method", "unknown") if isinstance(quantized, Mapping) else quantized
        return (
            f"quantization_config with quant_method={method}: quantized weights have no gradients, so nothing could be "
            "trained; use the checkpoint in bfloat16"
        )
    if config.get("is_encoder_decoder") is True:
        return (
            "is_encoder_decoder=true: an encoder reads the prompt in both directions, so an answer is not a "
            "continuation of its tokens; choose a model with a decoder only"
        )
    crossing = next((True for found in _values(config, "cross_attention_layers") if found), False)
    if crossing or config.get("add_cross_attention") is True:
        return (
            "cross attention: its decoder looks at images beside the tokens, not through features that take the place "
            "of tokens; choose a model whose images become tokens"
        )
    if any(found is True for key in ("alibi", "use_alibi") for found in _values(config, key)):
        return (
            "alibi=true: its attention adds a bias by distance, which the policy does not compute; choose a model with "
            "rotary or learned positions"
        )
    if any(found is True for found in _values(config, "prefix_lm")):
        return (
            "prefix_lm=true: it was trained with prompts whose tokens see each other, so a longer prompt changes the "
            "earlier tokens; choose a model in which each token sees only earlier ones"
        )
    if any(isinstance(found, int) and found > 0 for found in _values(config, "index_topk")):
        return (
            "index_topk: an indexer chooses the earlier tokens that a token attends to, which the policy does not "
            "compute; choose a model with full or sliding-window attention"
        )
    return unfit_values(config)


def seeing_key(config: Mapping[str, Any]) -> str | None:
    """The key that shows that a model takes images, in any part of its config.json; None for a text-only model."""
    return next((key for key in SEEING for found in _values(config, key) if found is not None), None)


def longest_sequence(config: Mapping[str, Any]) -> int | None:
    """Tokens up to which the rotary frequencies stay as they are; None for no limit. Beyond it the keys of all earlier
    tokens change (Phi-4-mini, `rope_type=longrope`), so no prefix could be shared or continued.

    >>> longest_sequence({"rope_scaling": {"type": "longrope"}, "original_max_position_embeddings": 4096})
    4096
    """
    for name in ("rope_parameters", "rope_scaling"):
        for rope in _values(config, name):
            if isinstance(rope, Mapping) and (rope.get("rope_type") or rope.get("type")) in CHANGING_ROPES:
                limits = (rope, config, config.get("text_config") or {})
                keys = ("original_max_position_embeddings", "max_position_embeddings")
                return next((at[key] for key in keys for at in limits if isinstance(at.get(key), int)), 0)
    return None


def unfit_class(folder: Path, config: Mapping[str, Any], *, has_images: bool) -> str | None:
    """Why transformers' class for this config.json does not serve; None where it does. Imports transformers."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, __version__
    from transformers.models.auto import configuration_auto

    families: Any = configuration_auto
    family = config.get("model_type")
    if family not in families.CONFIG_MAPPING_NAMES:
        if config.get("auto_map"):
            return (
                f"model_type={family} is code that comes with the checkpoint (auto_map), which is not run; use a "
                "checkpoint in the format of transformers, often named …-hf"
            )
        made_by = config.get("transformers_version", "an unknown version")
        return (
            f"model_type={family} is not in transformers {__version__} (the checkpoint was written by {made_by}); "
            "install a transformers that has it"
        )
    auto: Any = AutoModelForImageTextToText if has_images else AutoModelForCausalLM
    try:
        if (reason := unreadable(folder, str(family))) is not None:
            return reason
        settings = AutoConfig.from_pretrained(folder, local_files_only=True)
        if type(settings) not in auto._model_mapping:
            kind = "takes images and writes text" if has_images else "writes text"
            return (
                f"model_type={family} is no model that {kind} in transformers {__version__}, which has no "
                f"{auto.__name__} for it; choose one that is"
            )
        with torch.device("meta"):  # the modules without their numbers
            model = auto.from_config(settings)
        return _unfit_model(model, settings, has_images)
    except ImportError as error:
        return f"transformers cannot make a {family} of it ({headline(error)}); install what it asks for"
    except Exception as error:  # noqa: BLE001  code of any family, over a file that may hold anything
        return (
            f"something of which transformers cannot make a {family} ({type(error).__name__}: {words_of(error)}); "
            "correct it, or download config.json again"
        )


def _unfit_model(model: Any, settings: Any, has_images: bool) -> str | None:
    from vlmrl.models.attention.rules import attention_rules

    name = type(model).__name__
    if has_images and not hasattr(model.base_model, "get_image_features"):
        return (
            f"{name} has no get_image_features, so its images do not become features in place of tokens; choose a "
            "model whose images do"
        )
    if model.get_output_embeddings() is None:
        return f"{name} has no head over a vocabulary, so no token could be sampled; choose a language model"
    try:
        attention_rules(type(model), settings)
    except ModelError as error:
        return str(error)
    return None


def _values(content: Any, name: str) -> Iterator[Any]:
    """The values under `name` anywhere in a config.json, outermost first."""
    if isinstance(content, Mapping):
        if name in content:
            yield content[name]
        for value in content.values():
            yield from _values(value, name)
