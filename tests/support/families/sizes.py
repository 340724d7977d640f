"""Sizes that the tiny checkpoints share: a vision tower and a language model of about 0.1 M parameters each."""

from __future__ import annotations

from typing import Any

from support.families.recipe import Ids

HIDDEN = 64
HEAD_DIM = 32
"""vLLM's CPU attention takes 32, 64, 80, 96 …"""

VISION: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": 16,
}
"""A ViT of 4 × 4 patches (SigLIP, CLIP and their like)."""

ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}

HALF: dict[str, Any] = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
"""Normalization of SigLIP: pixels from -1 to 1."""

CLIP_NORM: dict[str, Any] = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}

IMAGENET: dict[str, Any] = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def text(ids: Ids, pad: str, eos: str, bos: str | None = None, **more: Any) -> dict[str, Any]:
    """Arguments of a text config: two layers, four query heads, two key and value heads."""
    sizes: dict[str, Any] = {
        "vocab_size": ids["vocab_size"],
        "hidden_size": HIDDEN,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 4096,
        "pad_token_id": ids[pad],
        "eos_token_id": ids[eos],
        "bos_token_id": None if bos is None else ids[bos],
        "tie_word_embeddings": False,
    }
    return sizes | more
