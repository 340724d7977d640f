"""Families that cut an image into tiles and give each tile a fixed number of tokens: InternVL, Idefics 3, SmolVLM."""

from __future__ import annotations

from typing import Any

from support.families.recipe import Ids, Recipe
from support.families.sizes import HALF, IMAGENET, VISION, text
from support.families.vocabulary import LLAMA_PATTERN, Vocabulary

INTERNVL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>", "<video>"),
)


def internvl_config(ids: Ids) -> dict[str, Any]:
    numbers = text(ids, "<|endoftext|>", "<|im_end|>", model_type="qwen2", num_attention_heads=2, num_key_value_heads=1)
    del numbers["head_dim"]
    return {
        "text_config": numbers,
        "vision_config": VISION | {"image_size": [64, 64], "patch_size": [16, 16]},
        "image_token_id": ids["<IMG_CONTEXT>"],
        "image_seq_length": 4,
        "downsample_ratio": 0.5,
        "tie_word_embeddings": False,
    }


INTERNVL = Recipe(
    model_type="internvl",
    vocabulary=Vocabulary(
        special=INTERNVL_TOKENS,
        eos="<|im_end|>",
        pad="<|endoftext|>",
        named={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        tokenizer_class="Qwen2Tokenizer",
    ),
    config=internvl_config,
    template="internvl",
    template_source=("transcribed", "huggingface/transformers internvl/convert_internvl_weights_to_hf.py"),
    stop=("<|im_end|>", "<|endoftext|>"),
    image_token="<IMG_CONTEXT>",
    processor_class="InternVLProcessor",
    image_processor={
        "image_processor_type": "GotOcr2ImageProcessor",
        "size": {"height": 64, "width": 64},
        "crop_to_patches": False,
        "min_patches": 1,
        "max_patches": 4,
        **IMAGENET,
    },
    processor={"image_seq_length": 4},
)

TILE_TAGS = tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))

SMOLVLM_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>", "<file_sep>", "<filename>"),
    *("<global-img>", *TILE_TAGS, "<fake_token_around_image>", "<image>", "<end_of_utterance>"),
)


def smolvlm_config(ids: Ids) -> dict[str, Any]:
    return {
        "text_config": text(ids, "<|im_end|>", "<end_of_utterance>", "<|im_start|>", model_type="llama"),
        "vision_config": VISION,
        "image_token_id": ids["<image>"],
        "pad_token_id": ids["<|im_end|>"],
        "scale_factor": 2,
        "tie_word_embeddings": False,
    }


SMOLVLM = Recipe(
    model_type="smolvlm",
    vocabulary=Vocabulary(
        special=SMOLVLM_TOKENS,
        eos="<end_of_utterance>",
        pad="<|im_end|>",
        bos="<|im_start|>",
        unk="<|endoftext|>",
        named={
            "fake_image_token": "<fake_token_around_image>",
            "image_token": "<image>",
            "global_image_token": "<global-img>",
            "end_of_utterance_token": "<end_of_utterance>",
        },
        pattern=None,
        normal_form=False,
        special_first=True,
    ),
    config=smolvlm_config,
    template="smolvlm",
    template_source=("packaged", "huggingface/transformers smolvlm/processing_smolvlm.py, DEFAULT_CHAT_TEMPLATE"),
    stop=("<end_of_utterance>",),
    image_token="<image>",
    processor_class="SmolVLMProcessor",
    image_processor={
        "image_processor_type": "SmolVLMImageProcessor",
        "do_image_splitting": True,
        "size": {"longest_edge": 128},
        "max_image_size": {"longest_edge": 64},
        **HALF,
    },
    processor={"image_seq_len": 4},
)

IDEFICS3_TOKENS = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|start_header_id|>"),
    *("<|end_header_id|>", "<|eot_id|>", "<fake_token_around_image>", "<image>", "<end_of_utterance>"),
    *("<global-img>", *TILE_TAGS),
)


def idefics3_config(ids: Ids) -> dict[str, Any]:
    ends = ("<|reserved_special_token_0|>", "<end_of_utterance>", "<|begin_of_text|>")
    return {
        "text_config": text(ids, *ends, model_type="llama"),
        "vision_config": VISION,
        "image_token_id": ids["<image>"],
        "pad_token_id": ids[ends[0]],
        "scale_factor": 2,
        "tie_word_embeddings": False,
    }


IDEFICS3 = Recipe(
    model_type="idefics3",
    vocabulary=Vocabulary(
        special=IDEFICS3_TOKENS,
        eos="<end_of_utterance>",
        pad="<|reserved_special_token_0|>",
        bos="<|begin_of_text|>",
        pattern=LLAMA_PATTERN,
        normal_form=False,
        adds_bos=True,
    ),
    config=idefics3_config,
    template="idefics3",
    template_source=("transcribed", "huggingface/transformers modernvbert/modular_modernvbert.py (Idefics 3's format)"),
    stop=("<|end_of_text|>", "<end_of_utterance>"),
    image_token="<image>",
    processor_class="Idefics3Processor",
    image_processor=SMOLVLM.image_processor | {"image_processor_type": "Idefics3ImageProcessor"},
    processor={"image_seq_len": 4},
)

TILED = {"internvl": INTERNVL, "idefics3": IDEFICS3, "smolvlm": SMOLVLM}
