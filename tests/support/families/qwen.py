"""Qwen's families with images."""

from __future__ import annotations

from typing import Any

from support.families.recipe import Ids, Recipe
from support.families.sizes import CLIP_NORM, ROPE, text
from support.families.vocabulary import Vocabulary

QWEN2_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
"""In the order of their ids (151643 …)."""

TOOL_TOKENS = ("<tool_call>", "</tool_call>")

ENDS = {"pad": "<|endoftext|>", "eos": "<|im_end|>"}


def vision_ids(ids: Ids) -> dict[str, int]:
    return {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
    }


def image_processor(patch_size: int, **norm: Any) -> dict[str, Any]:
    """preprocessor_config.json. `size` holds areas in pixels, although its keys speak of edges."""
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": patch_size,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "size": {"shortest_edge": (4 * patch_size) ** 2, "longest_edge": (32 * patch_size) ** 2},
        **norm,
    }


def qwen2_5_vl_config(ids: Ids) -> dict[str, Any]:
    """The text model has no `head_dim`: hidden_size / num_attention_heads, which is 32."""
    numbers = text(
        ids,
        **ENDS,
        num_attention_heads=2,
        num_key_value_heads=1,
        rope_parameters=ROPE | {"mrope_section": [4, 6, 6]},
    )
    del numbers["head_dim"]
    return {
        "text_config": numbers,
        "vision_config": {
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_heads": 2,
            "out_hidden_size": 64,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "fullatt_block_indexes": [1],
            "window_size": 56,
        },
        "tie_word_embeddings": False,
        **vision_ids(ids),
    }


QWEN2_5_VL = Recipe(
    model_type="qwen2_5_vl",
    vocabulary=Vocabulary(
        special=QWEN2_TOKENS, plain=TOOL_TOKENS, eos="<|im_end|>", pad="<|endoftext|>", tokenizer_class="Qwen2Tokenizer"
    ),
    config=qwen2_5_vl_config,
    template="qwen2_5_vl",
    template_source=(
        "transcribed",
        "volcengine/verl tests/experimental/agent_loop/test_basic_multimodal_agent_loop.py",
    ),
    stop=("<|im_end|>", "<|endoftext|>"),
    image_token="<|image_pad|>",
    processor_class="Qwen2_5_VLProcessor",
    image_processor=image_processor(14, **CLIP_NORM),
)

QWENS = {"qwen2_5_vl": QWEN2_5_VL}
