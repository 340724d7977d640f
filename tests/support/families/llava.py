"""LLaVA-NeXT and LLaVA-OneVision: tiles by the image's shape, line breaks among the features."""

from __future__ import annotations

from typing import Any

from support.families.recipe import Ids, Recipe
from support.families.sizes import CLIP_NORM, HALF, VISION, text
from support.families.vocabulary import Vocabulary

GRIDS = [[64, 64], [64, 128], [128, 64], [128, 128], [64, 192], [192, 64]]
"""Height and width of what an image may be cut into tiles of 64 × 64 from."""


def llava_onevision_config(ids: Ids) -> dict[str, Any]:
    numbers = text(ids, "<|endoftext|>", "<|im_end|>", model_type="qwen2", num_attention_heads=2, num_key_value_heads=1)
    del numbers["head_dim"]
    return {
        "text_config": numbers,
        "vision_config": VISION | {"model_type": "siglip_vision_model", "vision_use_head": False},
        "image_token_index": ids["<image>"],
        "video_token_index": ids["<video>"],
        "image_grid_pinpoints": GRIDS,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "tie_word_embeddings": False,
    }


LLAVA_ONEVISION = Recipe(
    model_type="llava_onevision",
    vocabulary=Vocabulary(
        special=("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"),
        eos="<|im_end|>",
        pad="<|endoftext|>",
        tokenizer_class="Qwen2Tokenizer",
    ),
    config=llava_onevision_config,
    template="llava_onevision",
    template_source=(
        "transcribed",
        "huggingface/transformers llava_onevision/convert_llava_onevision_weights_to_hf.py",
    ),
    stop=("<|im_end|>", "<|endoftext|>"),
    image_token="<image>",
    processor_class="LlavaOnevisionProcessor",
    image_processor={
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "size": {"height": 64, "width": 64},
        "image_grid_pinpoints": GRIDS,
        **HALF,
    },
    processor={
        "image_token": "<image>",
        "video_token": "<video>",
        "num_image_tokens": 16,
        "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": "anyres_max_9",
    },
)


def llava_next_config(ids: Ids) -> dict[str, Any]:
    return {
        "text_config": text(ids, "<pad>", "</s>", "<s>", model_type="mistral", sliding_window=None),
        "vision_config": VISION | {"model_type": "clip_vision_model", "projection_dim": 64},
        "image_token_index": ids["<image>"],
        "image_grid_pinpoints": GRIDS,
        "image_seq_length": 16,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
    }


LLAVA_NEXT = Recipe(
    model_type="llava_next",
    vocabulary=Vocabulary(
        special=("<unk>", "<s>", "</s>", "<image>", "<pad>"),
        eos="</s>",
        pad="<pad>",
        bos="<s>",
        unk="<unk>",
        kind="llama",
        special_first=True,
        adds_bos=True,
        tokenizer_class="LlamaTokenizer",
    ),
    config=llava_next_config,
    template="llava_next",
    template_source=("transcribed", "llava-hf/llava-v1.6-mistral-7b-hf, chat_template of its processor"),
    stop=("</s>",),
    image_token="<image>",
    processor_class="LlavaNextProcessor",
    image_processor={
        "image_processor_type": "LlavaNextImageProcessor",
        "size": {"shortest_edge": 64},
        "crop_size": {"height": 64, "width": 64},
        "image_grid_pinpoints": GRIDS,
        **CLIP_NORM,
    },
    processor={
        "image_token": "<image>",
        "patch_size": 16,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
    },
)

LLAVAS = {"llava_next": LLAVA_NEXT, "llava_onevision": LLAVA_ONEVISION}
