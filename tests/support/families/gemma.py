"""Gemma 3."""

from __future__ import annotations

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
        kind="sentencepiece",
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

GEMMAS = {"gemma3": GEMMA3}
