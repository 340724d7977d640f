"""Gemma 3 and 4: windows, images whose tokens see each other (3), per-layer embeddings (4)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from support.families.recipe import Ids, Recipe
from support.families.sizes import HALF, VISION, text
from support.families.vocabulary import Vocabulary
from support.families.weights import Scales

GEMMA3_TOKENS = (
    *("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "[multimodal]", "<unused0>", "<unused1>"),
    *("<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>", "<image_soft_token>"),
)
RUNS = (*("\n" * count for count in range(1, 9)), *("▁" * count for count in range(2, 5)))
"""Runs of line breaks and of spaces are tokens of Gemma's: line breaks merge with their neighbours."""


def gemma3_config(ids: Ids) -> dict[str, Any]:
    return {
        "text_config": text(
            ids,
            *("<pad>", "<eos>", "<bos>"),
            model_type="gemma3_text",
            sliding_window=24,
            layer_types=["sliding_attention", "full_attention"],
            query_pre_attn_scalar=32,
            tie_word_embeddings=True,
        ),
        "vision_config": VISION | {"model_type": "siglip_vision_model", "vision_use_head": False},
        "mm_tokens_per_image": 4,
        "boi_token_index": ids["<start_of_image>"],
        "eoi_token_index": ids["<end_of_image>"],
        "image_token_index": ids["<image_soft_token>"],
    }


GEMMA3 = Recipe(
    model_type="gemma3",
    vocabulary=Vocabulary(
        special=GEMMA3_TOKENS,
        plain=RUNS,
        eos="<eos>",
        pad="<pad>",
        bos="<bos>",
        unk="<unk>",
        named={
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
        kind="gemma",
        special_first=True,
        adds_bos=True,
        tokenizer_class="GemmaTokenizer",
    ),
    config=gemma3_config,
    template="gemma3",
    template_source=("transcribed", "huggingface/transformers gemma3/convert_gemma3_weights_orbax_to_hf.py"),
    stop=("<eos>", "<end_of_turn>"),
    image_token="<image_soft_token>",
    placeholder="<start_of_image>",
    processor_class="Gemma3Processor",
    image_processor={
        "image_processor_type": "Gemma3ImageProcessor",
        "image_seq_length": 4,
        "size": {"height": 64, "width": 64},
        **HALF,
    },
    processor={"image_seq_length": 4},
    scales=Scales(embedding=0.5, final_norm=3.0),
)

GEMMA4_TOKENS = (
    *("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "[multimodal]", "<unused0>"),
    *("<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>'),
    *("<|think|>", "<|channel>", "<channel|>", "<|turn>", "<turn|>"),
    *("<|image>", "<|audio>", "<|image|>", "<|audio|>", "<image|>", "<audio|>", "<|video|>"),
)


def gemma4_config(ids: Ids) -> dict[str, Any]:
    """Window layers have heads of 32, full layers of 64. transformers looks up the embedding of the pad token for the
    per-layer inputs of an image's tokens, vLLM that of id 0: `<pad>` must be 0."""
    return {
        "text_config": text(
            ids,
            *("<pad>", "<eos>", "<bos>"),
            model_type="gemma4_text",
            sliding_window=24,
            layer_types=["sliding_attention", "full_attention"],
            global_head_dim=64,
            num_global_key_value_heads=2,
            vocab_size_per_layer_input=ids["vocab_size"],
            hidden_size_per_layer_input=16,
            tie_word_embeddings=True,
        ),
        "vision_config": {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "patch_size": 16,
            "pooling_kernel_size": 2,
            "position_embedding_size": 64,
            "default_output_length": 70,
        },
        "audio_config": None,
        "boi_token_id": ids["<|image>"],
        "eoi_token_id": ids["<image|>"],
        "image_token_id": ids["<|image|>"],
        "video_token_id": ids["<|video|>"],
        "boa_token_id": ids["<|audio>"],
        "eoa_token_index": ids["<audio|>"],
        "audio_token_id": ids["<|audio|>"],
    }


GEMMA4 = Recipe(
    model_type="gemma4",
    vocabulary=Vocabulary(
        special=GEMMA4_TOKENS,
        plain=RUNS,
        eos="<eos>",
        pad="<pad>",
        bos="<bos>",
        unk="<unk>",
        named={
            "boi_token": "<|image>",
            "eoi_token": "<image|>",
            "image_token": "<|image|>",
            "boa_token": "<|audio>",
            "eoa_token": "<audio|>",
            "audio_token": "<|audio|>",
        },
        kind="gemma",
        special_first=True,
        adds_bos=True,
        tokenizer_class="GemmaTokenizer",
    ),
    config=gemma4_config,
    template="gemma4",
    template_source=("transcribed", "PrimeIntellect-ai/renderers renderers/gemma4.py (E2B and E4B, without tools)"),
    stop=("<eos>", "<turn|>"),
    image_token="<|image|>",
    processor_class="Gemma4Processor",
    processor={
        "image_seq_length": 70,
        "feature_extractor": {"feature_extractor_type": "Gemma4AudioFeatureExtractor"},
        "image_processor": {
            "image_processor_type": "Gemma4ImageProcessor",
            "patch_size": 16,
            "max_soft_tokens": 70,
            "pooling_kernel_size": 2,
        },
        "video_processor": {
            "video_processor_type": "Gemma4VideoProcessor",
            "patch_size": 16,
            "max_soft_tokens": 70,
            "pooling_kernel_size": 2,
        },
    },
    scales=Scales(embedding=0.5, final_norm=3.0, norms_scale_scores=True),
)


def gemma4_vision_config(ids: Ids) -> dict[str, Any]:
    """As the large Gemma 4: an image's tokens see each other, no per-layer embeddings, keys are values in full
    layers."""
    config = gemma4_config(ids)
    config["text_config"] |= {
        "use_bidirectional_attention": "vision",
        "hidden_size_per_layer_input": 0,
        "attention_k_eq_v": True,
    }
    return config


GEMMA4_VISION = replace(
    GEMMA4,
    config=gemma4_vision_config,
    template="gemma4_vision",
    template_source=("transcribed", "PrimeIntellect-ai/renderers renderers/gemma4.py (26B and 31B, without tools)"),
)

GEMMAS = {"gemma3": GEMMA3, "gemma4": GEMMA4, "gemma4_vision": GEMMA4_VISION}
