"""More families that the package does not know by name: LLaVA 1.5, Idefics 2, Janus."""

from __future__ import annotations

from typing import Any

from support.families.llava import LLAVA_NEXT
from support.families.recipe import Ids, Recipe
from support.families.sizes import CLIP_NORM, HALF, VISION, text
from support.families.vocabulary import LLAMA_PATTERN, Vocabulary


def llava_config(ids: Ids) -> dict[str, Any]:
    """A fixed number of tokens per image."""
    return {
        "text_config": text(ids, "<pad>", "</s>", "<s>", model_type="llama"),
        "vision_config": VISION | {"model_type": "clip_vision_model", "projection_dim": 64},
        "image_token_index": ids["<image>"],
        "image_seq_length": 16,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
    }


LLAVA = Recipe(
    model_type="llava",
    vocabulary=LLAVA_NEXT.vocabulary,
    config=llava_config,
    template="llava",
    template_source=("transcribed", "openvinotoolkit/openvino.genai chat_template_fallback_map.hpp"),
    stop=("</s>",),
    image_token="<image>",
    processor_class="LlavaProcessor",
    image_processor={
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 64},
        "crop_size": {"height": 64, "width": 64},
        **CLIP_NORM,
    },
    processor=LLAVA_NEXT.processor,
)


def idefics2_config(ids: Ids) -> dict[str, Any]:
    """Learned queries make four tokens of an image of any size."""
    return {
        "text_config": text(ids, "<unk>", "<end_of_utterance>", "<s>", model_type="mistral", sliding_window=None),
        "vision_config": VISION | {"image_size": 128},
        "perceiver_config": {
            "hidden_size": 64,
            "resampler_n_latents": 4,
            "resampler_depth": 1,
            "resampler_n_heads": 2,
            "resampler_head_dim": 32,
            "num_key_value_heads": 1,
        },
        "image_token_id": ids["<image>"],
        "tie_word_embeddings": False,
    }


IDEFICS2 = Recipe(
    model_type="idefics2",
    vocabulary=Vocabulary(
        special=("<unk>", "<s>", "</s>", "<fake_token_around_image>", "<image>", "<end_of_utterance>"),
        eos="<end_of_utterance>",
        pad="<unk>",
        bos="<s>",
        unk="<unk>",
        kind="llama",
        special_first=True,
        adds_bos=True,
        tokenizer_class="LlamaTokenizer",
    ),
    config=idefics2_config,
    template="idefics2",
    template_source=(
        "transcribed",
        "HuggingFaceM4/idefics2-8b, chat_template of its processor",
    ),
    stop=("</s>", "<end_of_utterance>"),
    image_token="<image>",
    processor_class="Idefics2Processor",
    image_processor={
        "image_processor_type": "Idefics2ImageProcessor",
        "do_image_splitting": False,
        "size": {"longest_edge": 128, "shortest_edge": 48},
        **HALF,
    },
    processor={"image_seq_len": 4},
)

JANUS_TOKENS = (
    *("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>", "<image_placeholder>"),
    *("<begin_of_image>", "<end_of_image>", "<|User|>", "<|Assistant|>"),
)


def janus_config(ids: Ids) -> dict[str, Any]:
    return {
        "text_config": text(ids, "<｜▁pad▁｜>", "<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>", model_type="llama"),
        "vision_config": VISION | {"projection_dim": 64, "depth": 1, "num_image_tokens": 16, "mlp_ratio": 1.5},
        "vq_config": {
            "embed_dim": 4,
            "num_embeddings": 32,
            "latent_channels": 32,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "num_patches": 4,
            "projection_dim": 64,
            "image_token_embed_dim": 64,
            "num_hidden_layers": 1,
        },
        "image_token_id": ids["<image_placeholder>"],
        "tie_word_embeddings": False,
    }


JANUS = Recipe(
    model_type="janus",
    vocabulary=Vocabulary(
        special=JANUS_TOKENS,
        eos="<｜end▁of▁sentence｜>",
        pad="<｜▁pad▁｜>",
        bos="<｜begin▁of▁sentence｜>",
        named={
            "image_token": "<image_placeholder>",
            "boi_token": "<begin_of_image>",
            "eoi_token": "<end_of_image>",
        },
        pattern=LLAMA_PATTERN,
        normal_form=False,
        adds_bos=True,
    ),
    config=janus_config,
    template="janus",
    template_source=("transcribed", "huggingface/transformers janus/convert_janus_weights_to_hf.py"),
    stop=("<｜end▁of▁sentence｜>",),
    image_token="<image_placeholder>",
    processor_class="JanusProcessor",
    image_processor={
        "image_processor_type": "JanusImageProcessor",
        "size": {"height": 64, "width": 64},
        **HALF,
    },
    processor={"num_image_tokens": 16},
)

MORE = {"llava": LLAVA, "idefics2": IDEFICS2, "janus": JANUS}
