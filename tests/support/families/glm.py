"""GLM-4.1V."""

from __future__ import annotations

from typing import Any

from support.families.recipe import Ids, Recipe
from support.families.sizes import CLIP_NORM, ROPE, text
from support.families.vocabulary import LLAMA_PATTERN, Vocabulary

GLM_TOKENS = (
    *("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    *("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>", "<|image|>", "<|video|>"),
)


def glm4v_config(ids: Ids) -> dict[str, Any]:
    """Queries, keys and values have biases in transformers always, in vLLM where `attention_bias` says so."""
    numbers = text(
        ids,
        *("<|endoftext|>", "<|endoftext|>"),
        num_attention_heads=2,
        num_key_value_heads=1,
        attention_bias=True,
        rope_parameters=ROPE | {"mrope_section": [4, 2, 2], "partial_rotary_factor": 0.5},
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
            "image_size": 56,
        },
        "image_token_id": ids["<|image|>"],
        "video_token_id": ids["<|video|>"],
        "image_start_token_id": ids["<|begin_of_image|>"],
        "image_end_token_id": ids["<|end_of_image|>"],
        "video_start_token_id": ids["<|begin_of_video|>"],
        "video_end_token_id": ids["<|end_of_video|>"],
        "tie_word_embeddings": False,
    }


GLM4V = Recipe(
    model_type="glm4v",
    vocabulary=Vocabulary(
        special=GLM_TOKENS,
        plain=("<think>", "</think>", "<answer>", "</answer>"),
        eos="<|endoftext|>",
        pad="<|endoftext|>",
        pattern=LLAMA_PATTERN,
        normal_form=False,
    ),
    config=glm4v_config,
    template="glm4v",
    template_source=("transcribed", "zai-org/GLM-4.1V-9B-Thinking, chat_template.jinja at revision 3c1471e"),
    stop=("<|endoftext|>", "<|user|>", "<|observation|>"),
    image_token="<|image|>",
    processor_class="Glm4vProcessor",
    image_processor={
        "image_processor_type": "Glm4vImageProcessor",
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "size": {"shortest_edge": 56 * 56, "longest_edge": 448 * 448},
        **CLIP_NORM,
    },
)
