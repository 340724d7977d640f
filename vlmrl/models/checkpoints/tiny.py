"""The tiny checkpoint: a real Qwen3-VL with random weights, built here in seconds and cached by content.

What is written is an ordinary Hugging Face folder: `Qwen3VLForConditionalGeneration` (vision tower, deepstack,
interleaved MRoPE, tied embeddings) in float32, a byte-level BPE tokenizer with Qwen3-VL's special tokens, its chat
template, and the image processor's settings. It loads by the same code as the real one (load.py).

Nothing here imports torch unless the checkpoint has to be built.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from vlmrl.config.model import ModelConfig, TinyConfig
from vlmrl.errors import ConfigError
from vlmrl.models.cache import built
from vlmrl.models.checkpoints.text_files import (
    MERGE_SIZE,
    PATCH_SIZE,
    TEMPORAL_PATCH_SIZE,
    special_ids,
    write_text_files,
)

BUILDER_VERSION = 1
"""Raise it when this file writes other bytes for the same config and texts: old caches are then not found."""

MAX_PIXELS = 1024 * 1024
"""Of an image: 1024 tokens."""
VOCAB_MULTIPLE = 64
"""The model's vocabulary is rounded up to this, so that it has ids the tokenizer does not know, as the real one has."""


def ensure_tiny_checkpoint(config: ModelConfig, texts: tuple[str, ...]) -> Path:
    """The folder of the tiny checkpoint of `config.tiny`, built if it is not in the cache.

    `texts` are what the BPE merges are trained on. The same sizes, seed and texts give the same bytes in every
    process. Safe to call from several processes at once; a folder that is incomplete or was changed is mended.
    Raises `ConfigError` for sizes that are no model.
    """
    check_tiny(config)
    sizes = _sizes(config)

    def build(folder: Path) -> None:
        tokenizer = write_text_files(folder, texts, sizes.bpe_merges, sizes.max_position_embeddings, MAX_PIXELS)
        vocab_size = -(-tokenizer.get_vocab_size() // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        _write_weights(sizes, special_ids(tokenizer), vocab_size, folder)

    key = [BUILDER_VERSION, _plain(sizes), list(texts), version("transformers"), version("tokenizers")]
    return built("tiny", key, build)


def check_tiny(config: ModelConfig) -> None:
    """Raise `ConfigError` where the sizes of `model.tiny` do not make a Qwen3-VL. Imports no torch."""
    sizes = _sizes(config)
    head_dim_vision, rest = divmod(sizes.vision_hidden_size, sizes.vision_num_heads)
    demands = [
        (
            sizes.num_attention_heads % sizes.num_key_value_heads == 0,
            f"num_attention_heads={sizes.num_attention_heads} is no multiple of "
            f"num_key_value_heads={sizes.num_key_value_heads}",
        ),
        (
            sizes.head_dim % 2 == 0 and sizes.head_dim >= 8,
            f"head_dim={sizes.head_dim} is odd or below 8, so MRoPE has no room for time, height and width",
        ),
        (
            rest == 0 and head_dim_vision % 4 == 0,
            f"vision_hidden_size={sizes.vision_hidden_size} / vision_num_heads={sizes.vision_num_heads} "
            "is no multiple of 4, so the vision tower's rotary embedding does not fit",
        ),
        (
            all(0 <= index < sizes.vision_depth for index in sizes.deepstack_visual_indexes)
            and len(sizes.deepstack_visual_indexes) <= sizes.num_hidden_layers,
            f"deepstack_visual_indexes={list(sizes.deepstack_visual_indexes)} name layers that "
            f"vision_depth={sizes.vision_depth} or num_hidden_layers={sizes.num_hidden_layers} does not have",
        ),
    ]
    for holds, problem in demands:
        if not holds:
            raise ConfigError(f"model.tiny.{problem}: change one of them")


def mrope_section(head_dim: int) -> list[int]:
    """Rotary frequencies for time, height and width, in Qwen3-VL's proportions; they sum to head_dim / 2.

    >>> mrope_section(128), mrope_section(32)
    ([24, 20, 20], [6, 5, 5])
    """
    half = head_dim // 2
    space = half * 20 // 64
    return [half - 2 * space, space, space]


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


def _write_weights(sizes: TinyConfig, ids: dict[str, int], vocab_size: int, folder: Path) -> None:
    """config.json and model.safetensors.

    Names and shapes come from the real class on the meta device; values from numpy, because torch's normal numbers
    differ by rounding between processors and numpy's do not. The rule is transformers' own initialization.
    """
    import numpy as np
    import torch
    from safetensors.numpy import save_file
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLForConditionalGeneration

    config = Qwen3VLConfig(
        text_config={
            "vocab_size": vocab_size,
            "hidden_size": sizes.hidden_size,
            "intermediate_size": sizes.intermediate_size,
            "num_hidden_layers": sizes.num_hidden_layers,
            "num_attention_heads": sizes.num_attention_heads,
            "num_key_value_heads": sizes.num_key_value_heads,
            "head_dim": sizes.head_dim,
            "max_position_embeddings": sizes.max_position_embeddings,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_interleaved": True,
                "mrope_section": mrope_section(sizes.head_dim),
            },
            "initializer_range": sizes.initializer_range,
            "tie_word_embeddings": True,
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
        },
        vision_config={
            "depth": sizes.vision_depth,
            "hidden_size": sizes.vision_hidden_size,
            "intermediate_size": sizes.vision_intermediate_size,
            "num_heads": sizes.vision_num_heads,
            "out_hidden_size": sizes.hidden_size,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": list(sizes.deepstack_visual_indexes),
            "patch_size": PATCH_SIZE,
            "spatial_merge_size": MERGE_SIZE,
            "temporal_patch_size": TEMPORAL_PATCH_SIZE,
            "initializer_range": sizes.initializer_range,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
        architectures=["Qwen3VLForConditionalGeneration"],
        dtype="float32",
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(config)  # type: ignore[no-untyped-call]
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
