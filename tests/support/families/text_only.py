"""Families without images: Qwen3, Llama 3."""

from __future__ import annotations

from typing import Any

from support.families.recipe import Ids, Recipe
from support.families.sizes import ROPE, text
from support.families.vocabulary import LLAMA_PATTERN, Vocabulary

LLAMA3_TOKENS = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"),
    *("<|finetune_right_pad_id|>", "<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eom_id|>", "<|eot_id|>", "<|python_tag|>"),
)
"""In the order of their ids (128000 …)."""


def qwen3_config(ids: Ids) -> dict[str, Any]:
    return text(ids, "<|endoftext|>", "<|im_end|>")


def llama3_config(ids: Ids) -> dict[str, Any]:
    scaled = ROPE | {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    }
    return text(ids, "<|finetune_right_pad_id|>", "<|eot_id|>", "<|begin_of_text|>", rope_parameters=scaled)


QWEN3 = Recipe(
    model_type="qwen3",
    vocabulary=Vocabulary(
        special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        plain=("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
        eos="<|im_end|>",
        pad="<|endoftext|>",
        tokenizer_class="Qwen2Tokenizer",
    ),
    config=qwen3_config,
    template="qwen3",
    template_source=("transcribed", "PrimeIntellect-ai/renderers renderers/qwen3.py"),
    stop=("<|im_end|>", "<|endoftext|>"),
)

LLAMA3 = Recipe(
    model_type="llama",
    vocabulary=Vocabulary(
        special=LLAMA3_TOKENS,
        eos="<|eot_id|>",
        pad="<|finetune_right_pad_id|>",
        bos="<|begin_of_text|>",
        pattern=LLAMA_PATTERN,
        normal_form=False,
        adds_bos=True,
    ),
    config=llama3_config,
    template="llama3",
    template_source=("transcribed", "PrimeIntellect-ai/renderers renderers/llama_3.py (Llama 3.2)"),
    stop=("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
)

TEXT_ONLY = {"qwen3": QWEN3, "llama3": LLAMA3}
