"""Families that the package does not know by name: Aya Vision, Ovis 2, LFM2-VL."""

from __future__ import annotations

from typing import Any

from support.families.recipe import Ids, Recipe
from support.families.sizes import CLIP_NORM, HALF, HIDDEN, VISION, text
from support.families.vocabulary import Vocabulary

COHERE_TOKENS = (
    *("<PAD>", "<UNK>", "<CLS>", "<SEP>", "<MASK_TOKEN>", "<BOS_TOKEN>", "<EOS_TOKEN>", "<EOP_TOKEN>"),
    *("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>"),
    *("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
    *("<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_LINE_BREAK|>", "<|IMG_PATCH|>"),
)


def aya_vision_config(ids: Ids) -> dict[str, Any]:
    """transformers' class for images ignores `logit_scale`, which its text class and vLLM apply."""
    return {
        "text_config": text(
            ids,
            *("<PAD>", "<|END_OF_TURN_TOKEN|>", "<BOS_TOKEN>"),
            model_type="cohere2",
            logit_scale=0.25,
            sliding_window=24,
            layer_types=["sliding_attention", "full_attention"],
            tie_word_embeddings=True,
        ),
        "vision_config": VISION | {"model_type": "siglip_vision_model", "vision_use_head": False},
        "image_token_index": ids["<|IMG_PATCH|>"],
        "downsample_factor": 2,
        "alignment_intermediate_size": 96,
    }


AYA_VISION = Recipe(
    model_type="aya_vision",
    vocabulary=Vocabulary(
        special=COHERE_TOKENS,
        eos="<|END_OF_TURN_TOKEN|>",
        pad="<PAD>",
        bos="<BOS_TOKEN>",
        unk="<UNK>",
        pattern=None,
        special_first=True,
        adds_bos=True,
        tokenizer_class="CohereTokenizer",
    ),
    config=aya_vision_config,
    template="aya_vision",
    template_source=(
        "transcribed",
        "a script of Cohere's for an early Aya Vision checkpoint, with the published roles",
    ),
    stop=("<|END_OF_TURN_TOKEN|>",),
    image_token="<|IMG_PATCH|>",
    placeholder="<image>",
    processor_class="AyaVisionProcessor",
    image_processor={
        "image_processor_type": "GotOcr2ImageProcessor",
        "size": {"height": 64, "width": 64},
        "crop_to_patches": True,
        "min_patches": 1,
        "max_patches": 4,
        **HALF,
    },
    processor={"image_token": "<image>", "patch_size": 16, "img_size": 64, "downsample_factor": 2},
)

OVIS2_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<IMG_ATOM>", "<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"),
)


def ovis2_config(ids: Ids) -> dict[str, Any]:
    """The tokens around an image's features have embeddings of the vision tower too."""
    numbers = text(ids, "<|endoftext|>", "<|im_end|>", model_type="qwen2", num_attention_heads=2, num_key_value_heads=1)
    del numbers["head_dim"]
    return {
        "text_config": numbers,
        "vision_config": VISION | {"vocab_size": 64, "hidden_stride": 2, "num_visual_indicator_tokens": 5},
        "image_token_id": ids["<IMG_ATOM>"],
        "visual_indicator_token_ids": [ids[token] for token in OVIS2_TOKENS[4:]],
        "vocab_size": ids["vocab_size"],
        "hidden_size": numbers["hidden_size"],
        "tie_word_embeddings": False,
    }


OVIS2 = Recipe(
    model_type="ovis2",
    vocabulary=Vocabulary(
        special=OVIS2_TOKENS, eos="<|im_end|>", pad="<|endoftext|>", tokenizer_class="Qwen2Tokenizer"
    ),
    config=ovis2_config,
    template="ovis2",
    template_source=("transcribed", "huggingface/transformers ovis2/convert_ovis2_weights_to_hf.py"),
    stop=("<|im_end|>", "<|endoftext|>"),
    image_token="<IMG_ATOM>",
    placeholder="<image>",
    processor_class="Ovis2Processor",
    image_processor={
        "image_processor_type": "Ovis2ImageProcessor",
        "size": {"height": 64, "width": 64},
        "crop_to_patches": True,
        "max_patches": 4,
        **CLIP_NORM,
    },
    processor={"image_seq_length": 4},
)

LFM2_TOKENS = (
    *("<|pad|>", "<|startoftext|>", "<|endoftext|>", "<|fim_pre|>", "<|fim_mid|>", "<|fim_suf|>"),
    *("<|im_start|>", "<|im_end|>", "<|tool_list_start|>", "<|tool_list_end|>"),
    *("<|tool_call_start|>", "<|tool_call_end|>", "<|tool_response_start|>", "<|tool_response_end|>"),
    *("<image>", *(f"<|img_row_{row}_col_{column}|>" for row in range(1, 5) for column in range(1, 5))),
    *("<|img_thumbnail|>", "<|image_start|>", "<|image_end|>"),
)


def lfm2_vl_config(ids: Ids) -> dict[str, Any]:
    """Layers of short convolutions and of attention take turns."""
    numbers = text(
        ids,
        *("<|pad|>", "<|im_end|>", "<|startoftext|>"),
        model_type="lfm2",
        num_attention_heads=2,
        num_key_value_heads=1,
        layer_types=["conv", "full_attention"],
        block_auto_adjust_ff_dim=False,
        block_dim=HIDDEN,  # vLLM reads these, transformers does not
        block_ff_dim=96,
        conv_dim=HIDDEN,
        conv_dim_out=HIDDEN,
        tie_word_embeddings=True,
    )
    del numbers["head_dim"]
    tower = VISION | {"model_type": "siglip2_vision_model", "num_patches": 16, "vision_use_head": False}
    del tower["image_size"]
    return {
        "text_config": numbers,
        "vision_config": tower,
        "image_token_id": ids["<image>"],
        "projector_hidden_size": 64,
        "downsample_factor": 2,
    }


LFM2_VL = Recipe(
    model_type="lfm2_vl",
    vocabulary=Vocabulary(
        special=LFM2_TOKENS,
        eos="<|im_end|>",
        pad="<|pad|>",
        bos="<|startoftext|>",
        named={
            "image_token": "<image>",
            "image_start_token": "<|image_start|>",
            "image_end_token": "<|image_end|>",
            "image_thumbnail": "<|img_thumbnail|>",
        },
        normal_form=False,
        special_first=True,
        adds_bos=True,
    ),
    config=lfm2_vl_config,
    template="lfm2_vl",
    template_source=("transcribed", "LiquidAI/LFM2-VL-450M, chat_template.jinja"),
    stop=("<|im_end|>", "<|endoftext|>"),
    image_token="<image>",
    processor_class="Lfm2VlProcessor",
    image_processor={
        "image_processor_type": "Lfm2VlImageProcessor",
        "tile_size": 64,
        "size": {"height": 64, "width": 64},
        "min_image_tokens": 2,
        "max_image_tokens": 8,
        "max_tiles": 4,
        **HALF,
    },
    needs_torchvision=True,
)

UNNAMED = {"aya_vision": AYA_VISION, "ovis2": OVIS2, "lfm2_vl": LFM2_VL}
