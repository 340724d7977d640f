"""Qwen's families with images and videos."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from support.families.recipe import Ids, Recipe
from support.families.sizes import CLIP_NORM, HALF, ROPE, text
from support.families.vocabulary import Vocabulary

QWEN2_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
"""In the order of their ids (151643 …)."""

THINK_TOKENS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
"""Added tokens that are not special."""

ENDS = ("<|endoftext|>", "<|im_end|>")
"""Padding and the end of a turn."""


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


def video_processor(name: str, patch_size: int, **norm: Any) -> dict[str, Any]:
    """video_preprocessor_config.json. `size` holds areas: of all frames for Qwen3-VL, of one for Qwen2-VL."""
    numbers = image_processor(patch_size, **norm)
    del numbers["image_processor_type"]
    return {"video_processor_type": name, **numbers, "cap_pixels_per_frame": False}


VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_heads": 2,
    "out_hidden_size": 64,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}


def qwen2_vl_config(ids: Ids) -> dict[str, Any]:
    """The text model has no `head_dim`: hidden_size / num_attention_heads, which is 32."""
    numbers = text(
        ids,
        *ENDS,
        num_attention_heads=2,
        num_key_value_heads=1,
        rope_parameters=ROPE | {"mrope_section": [4, 6, 6]},
    )
    del numbers["head_dim"]
    tower = {"depth": 2, "embed_dim": 64, "hidden_size": 64, "num_heads": 2, "patch_size": 14, "mlp_ratio": 2}
    return {"text_config": numbers, "vision_config": tower, "tie_word_embeddings": False, **vision_ids(ids)}


def qwen2_5_vl_config(ids: Ids) -> dict[str, Any]:
    """As Qwen2-VL, with windows in the vision tower."""
    tower = VISION | {"patch_size": 14, "fullatt_block_indexes": [1], "window_size": 56}
    return qwen2_vl_config(ids) | {"vision_config": tower}


def qwen3_vl_config(ids: Ids, **more: Any) -> dict[str, Any]:
    return {
        "text_config": text(
            ids, *ENDS, rope_parameters=ROPE | {"mrope_section": [6, 5, 5], "mrope_interleaved": True}, **more
        ),
        "vision_config": VISION | {"patch_size": 16, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]},
        "tie_word_embeddings": False,
        **vision_ids(ids),
    }


def qwen3_5_config(ids: Ids, **more: Any) -> dict[str, Any]:
    """Linear attention (a gated delta net) and full attention take turns. vLLM's linear attention on a CPU wants heads
    of 128, as published checkpoints have."""
    return {
        "text_config": text(
            ids,
            *ENDS,
            head_dim=64,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=1,
            rope_parameters=ROPE
            | {"mrope_section": [4, 2, 2], "mrope_interleaved": True, "partial_rotary_factor": 0.25},
            layer_types=["linear_attention", "full_attention"] * 2,
            linear_key_head_dim=128,
            linear_value_head_dim=128,
            linear_num_key_heads=1,
            linear_num_value_heads=2,
            **more,
        ),
        "vision_config": VISION | {"patch_size": 16, "num_position_embeddings": 64},
        "tie_word_embeddings": False,
        **vision_ids(ids),
    }


def with_experts(config: Callable[..., dict[str, Any]], **more: Any) -> Callable[[Ids], dict[str, Any]]:
    """Four experts, of which two work on a token."""
    return lambda ids: config(ids, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=96, **more)


QWEN2_VL = Recipe(
    model_type="qwen2_vl",
    vocabulary=Vocabulary(
        special=QWEN2_TOKENS, eos="<|im_end|>", pad="<|endoftext|>", tokenizer_class="Qwen2Tokenizer"
    ),
    config=qwen2_vl_config,
    template="qwen2_vl",
    template_source=("transcribed", "openvinotoolkit/openvino.genai chat_template_fallback_map.hpp"),
    stop=("<|im_end|>", "<|endoftext|>"),
    image_token="<|image_pad|>",
    processor_class="Qwen2VLProcessor",
    image_processor=image_processor(14, **CLIP_NORM),
    video_processor=video_processor("Qwen2VLVideoProcessor", 14, **CLIP_NORM),
    video_token="<|video_pad|>",
)

QWEN2_5_VL = replace(
    QWEN2_VL,
    model_type="qwen2_5_vl",
    vocabulary=replace(QWEN2_VL.vocabulary, plain=THINK_TOKENS[:2]),
    config=qwen2_5_vl_config,
    template="qwen2_5_vl",
    template_source=(
        "transcribed",
        "volcengine/verl tests/experimental/agent_loop/test_basic_multimodal_agent_loop.py",
    ),
    processor_class="Qwen2_5_VLProcessor",
)

QWEN3_VL = replace(
    QWEN2_VL,
    model_type="qwen3_vl",
    vocabulary=replace(QWEN2_VL.vocabulary, plain=THINK_TOKENS),
    config=qwen3_vl_config,
    template="qwen3_vl",
    template_source=("transcribed", "PrimeIntellect-ai/renderers renderers/qwen3_vl.py"),
    processor_class="Qwen3VLProcessor",
    image_processor=image_processor(16, **HALF),
    video_processor=video_processor("Qwen3VLVideoProcessor", 16, **HALF),
)

QWEN3_VL_MOE = replace(
    QWEN3_VL,
    model_type="qwen3_vl_moe",
    config=with_experts(qwen3_vl_config, decoder_sparse_step=1, norm_topk_prob=True),
)

QWEN3_5 = replace(
    QWEN3_VL,
    model_type="qwen3_5",
    config=qwen3_5_config,
    template="qwen3_5",
    template_source=("transcribed", "PrimeIntellect-ai/renderers renderers/qwen35.py"),
)

QWEN3_5_MOE = replace(
    QWEN3_5,
    model_type="qwen3_5_moe",
    config=with_experts(qwen3_5_config, shared_expert_intermediate_size=32),
)

QWENS = {
    "qwen2_vl": QWEN2_VL,
    "qwen2_5_vl": QWEN2_5_VL,
    "qwen3_vl": QWEN3_VL,
    "qwen3_vl_moe": QWEN3_VL_MOE,
    "qwen3_5": QWEN3_5,
    "qwen3_5_moe": QWEN3_5_MOE,
}
