"""The tiny checkpoint: a real architecture with random weights, built here in seconds and cached by content.

What is written is an ordinary Hugging Face folder. For Qwen3-VL: `Qwen3VLForConditionalGeneration` (vision tower,
deepstack, interleaved MRoPE, tied embeddings) in float32, a byte-level BPE tokenizer with its special tokens, its
chat template, and the image processor's settings. It loads by the same code as a released checkpoint (load.py).

Nothing here imports torch unless the checkpoint has to be built.
"""

from __future__ import annotations

from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmrl.config.model import ModelConfig, TinyConfig
from vlmrl.models.checkpoints.built_folders import built
from vlmrl.models.checkpoints.text_files import config_token_ids, write_text_files
from vlmrl.models.families import family_of
from vlmrl.models.families.base import CheckpointRecipe

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

BUILDER_VERSION = 2
"""Raise it when this file writes other bytes for the same config and texts: old caches are then not found."""

VOCAB_MULTIPLE = 64
"""The model's vocabulary is rounded up to this, so that it has ids the tokenizer does not know, as released models
have."""


def ensure_tiny_checkpoint(config: ModelConfig, texts: tuple[str, ...]) -> Path:
    """The folder of the tiny checkpoint of `config.tiny`, built if it is not in the cache.

    The BPE merges are trained on `texts`. The same sizes, seed and texts give the same bytes in every process. Safe to
    call from several processes at once; an incomplete or changed folder is repaired. `preflight` has checked the sizes
    and the family.
    """
    sizes, family = _sizes(config), family_of(config.vlm)
    recipe = family.recipe
    assert recipe is not None, f"preflight refuses model.tiny for family {family.name}"
    assert recipe.tiny is not None, f"preflight refuses model.tiny for family {family.name}"
    bounds = recipe.tiny

    def build(folder: Path) -> None:
        tokenizer = write_text_files(folder, recipe, texts, sizes.bpe_merges, sizes.max_position_embeddings, bounds)
        text_ids, ids = config_token_ids(recipe, tokenizer)
        numbers = family.tiny_config(sizes, padded_vocabulary(tokenizer.get_vocab_size()))
        numbers["text_config"] |= text_ids
        _write_weights(_write_config(folder, family.name, recipe, numbers | ids), sizes, folder)

    key = [BUILDER_VERSION, asdict(recipe), _plain(sizes), list(texts), version("transformers"), version("tokenizers")]
    return built("tiny", key, build)


def padded_vocabulary(tokens: int) -> int:
    """`tokens`, rounded up to `VOCAB_MULTIPLE`."""
    return -(-tokens // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def largest_vocabulary(recipe: CheckpointRecipe, sizes: TinyConfig) -> int:
    """Tokens of the model if the tokenizer learns all `bpe_merges`; it learns fewer from few texts."""
    return padded_vocabulary(256 + sizes.bpe_merges + len(recipe.special_tokens) + len(recipe.atomic_tokens))


def _sizes(config: ModelConfig) -> TinyConfig:
    assert config.tiny is not None, "model.tiny is not set"
    return config.tiny


def _plain(sizes: TinyConfig) -> dict[str, Any]:
    """The sizes as JSON; works for the dataclass and for its DictConfig."""
    return {
        name: list(value) if name == "deepstack_visual_indexes" else value
        for name in TinyConfig.__dataclass_fields__
        for value in [getattr(sizes, name)]
    }


def _write_config(folder: Path, family: str, recipe: CheckpointRecipe, numbers: dict[str, Any]) -> PreTrainedConfig:
    """Write config.json and return it."""
    from transformers import AutoConfig

    config: PreTrainedConfig = AutoConfig.for_model(
        family, **numbers, architectures=[recipe.architecture], dtype="float32"
    )
    config.save_pretrained(folder)
    return config


def _write_weights(config: PreTrainedConfig, sizes: TinyConfig, folder: Path) -> None:
    """Write model.safetensors.

    Names and shapes come from the real class on the meta device. Values come from numpy: torch's normal numbers differ
    by rounding between processors, numpy's do not. The rule is transformers' own initialization.
    """
    import numpy as np
    import torch
    from safetensors.numpy import save_file
    from transformers import AutoModelForImageTextToText

    auto: Any = AutoModelForImageTextToText
    with torch.device("meta"):
        model = auto.from_config(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    shapes.pop("lm_head.weight", None)  # tied to the embedding
    random = np.random.default_rng(sizes.seed)
    weights = {
        name: random.standard_normal(shape, np.float32) * np.float32(sizes.initializer_range)
        if len(shape) > 1
        else np.full(shape, 1.0 if name.endswith("weight") else 0.0, np.float32)
        for name, shape in sorted(shapes.items())
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
