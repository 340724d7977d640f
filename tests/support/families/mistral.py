"""Mistral 3 and Pixtral: rows of image tokens with a break after each."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from support.families.recipe import Ids, Recipe
from support.families.sizes import CLIP_NORM, VISION, text
from support.families.vocabulary import TEKKEN_PATTERN, Vocabulary

TEKKEN_TOKENS = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]"),
    *("[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)
"""In the order of their ids (0 …)."""


def mistral3_config(ids: Ids) -> dict[str, Any]:
    return {
        "text_config": text(ids, "<pad>", "</s>", "<s>", model_type="mistral", sliding_window=None),
        "vision_config": VISION | {"model_type": "pixtral", "image_size": 128},
        "image_token_index": ids["[IMG]"],
        "spatial_merge_size": 2,
        "vision_feature_layer": -1,
        "tie_word_embeddings": False,
    }


MISTRAL3 = Recipe(
    model_type="mistral3",
    vocabulary=Vocabulary(
        special=TEKKEN_TOKENS,
        eos="</s>",
        pad="<pad>",
        bos="<s>",
        unk="<unk>",
        pattern=TEKKEN_PATTERN,
        normal_form=False,
        special_first=True,
        adds_bos=True,
    ),
    config=mistral3_config,
    template="mistral3",
    template_source=(
        "transcribed",
        "ggml-org/llama.cpp models/templates/mistralai-Mistral-Small-3.1-24B-Instruct-2503.jinja (without tools)",
    ),
    stop=("</s>",),
    image_token="[IMG]",
    processor_class="PixtralProcessor",
    image_processor={
        "image_processor_type": "PixtralImageProcessor",
        "patch_size": 16,
        "size": {"longest_edge": 128},
        **CLIP_NORM,
    },
    processor={
        "image_token": "[IMG]",
        "image_break_token": "[IMG_BREAK]",
        "image_end_token": "[IMG_END]",
        "patch_size": 16,
        "spatial_merge_size": 2,
    },
)

PIXTRAL_TOKENS = (*TEKKEN_TOKENS[:17], "<SPECIAL_17>", "<SPECIAL_18>", "<SPECIAL_19>")
"""Pixtral's Tekken is older: it has no tokens for a system prompt."""


def pixtral_config(ids: Ids) -> dict[str, Any]:
    return {
        "text_config": text(ids, "<pad>", "</s>", "<s>", model_type="mistral", sliding_window=None),
        "vision_config": VISION | {"model_type": "pixtral", "image_size": 128},
        "image_token_index": ids["[IMG]"],
        "image_seq_length": 1,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "tie_word_embeddings": False,
    }


PIXTRAL = replace(
    MISTRAL3,
    model_type="llava",
    vocabulary=replace(MISTRAL3.vocabulary, special=PIXTRAL_TOKENS),
    config=pixtral_config,
    template="pixtral",
    template_source=("transcribed", "huggingface/transformers mistral3/convert_mistral3_weights_to_hf.py"),
    processor=MISTRAL3.processor | {"spatial_merge_size": 1},
)

MISTRALS = {"mistral3": MISTRAL3, "pixtral": PIXTRAL}
