"""Tiny random models of families whose attention has windows, soft caps or images that see themselves, and prompts and
samples for them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from support.helpers import Sampled
from vlmrl.types import ImageItem, IntArray, MMItem, Placeholder, Prompt, TrainingSample, mm_token_type_ids

families: Any = transformers  # transformers does not annotate its constructors

VOCABULARY, IMAGE = 40, 39
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.15,
    "pad_token_id": 0,
}
MIXED = {"layer_types": ["sliding_attention", "full_attention"] * 2}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "patch_size": 4,
}
GEMMA_4 = {
    **TEXT,
    **MIXED,
    "global_head_dim": 16,
    "hidden_size_per_layer_input": 6,
    "vocab_size_per_layer_input": VOCABULARY,
    "num_kv_shared_layers": 2,
}


def _gemma3(window: int) -> Any:
    return families.Gemma3Config(
        text_config={**TEXT, **MIXED, "sliding_window": window, "query_pre_attn_scalar": 8},
        vision_config={**VISION, "image_size": 12},
        mm_tokens_per_image=9,
        image_token_id=IMAGE,
    )


def _gemma4(window: int, **text: Any) -> Any:
    return families.Gemma4Config(
        text_config={**GEMMA_4, "sliding_window": window, "final_logit_softcapping": 3.0, **text},
        vision_config={
            **VISION,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "global_head_dim": 8,
            "pooling_kernel_size": 2,
        },
        image_token_id=IMAGE,
    )


MODELS: dict[str, tuple[str, Callable[[int], Any]]] = {
    "gemma2": (
        "Gemma2ForCausalLM",
        lambda w: families.Gemma2Config(
            **TEXT,
            **MIXED,
            sliding_window=w,
            attn_logit_softcapping=1.5,
            final_logit_softcapping=2.0,
            query_pre_attn_scalar=8,
        ),
    ),
    "gemma3_text": (
        "Gemma3ForCausalLM",
        lambda w: families.Gemma3TextConfig(**TEXT, **MIXED, sliding_window=w, query_pre_attn_scalar=8),
    ),
    "gemma3": ("Gemma3ForConditionalGeneration", _gemma3),
    "gemma4": ("Gemma4ForConditionalGeneration", _gemma4),
    "gemma4_vision": (
        "Gemma4ForConditionalGeneration",
        lambda w: _gemma4(w, use_bidirectional_attention="vision", attention_k_eq_v=True, num_global_key_value_heads=1),
    ),
    "mistral": ("MistralForCausalLM", lambda w: families.MistralConfig(**TEXT, sliding_window=w)),
    "cohere2": ("Cohere2ForCausalLM", lambda w: families.Cohere2Config(**TEXT, **MIXED, sliding_window=w)),
    "qwen2": (
        "Qwen2ForCausalLM",
        lambda w: families.Qwen2Config(
            **TEXT, use_sliding_window=True, sliding_window=w, max_window_layers=2, layer_types=None
        ),
    ),
    "granite": ("GraniteForCausalLM", lambda w: families.GraniteConfig(**TEXT, logits_scaling=4.0)),
}
SEE_IMAGES = {"gemma3", "gemma4", "gemma4_vision"}


@cache
def _built(name: str, window: int) -> Any:
    class_name, config = MODELS[name]
    torch.manual_seed(0)
    model: Any = getattr(families, class_name)(config(window)).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" not in key and float(parameter.std()) == 0:  # some families begin with projections of zero
                parameter.normal_(0, 0.15)
            if name.startswith("gemma4") and "q_norm" in key:
                parameter.fill_(0.3)  # scores of ±16, as at first, would magnify rounding
    return model


def build(name: str, window: int) -> Any:
    """A new copy of the model; equal arguments give equal weights."""
    return copy.deepcopy(_built(name, window))


def image(name: str, number: int) -> ImageItem:
    """A noise image of 9 tokens (Gemma 3) or 4 + number tokens (Gemma 4)."""
    random = np.random.default_rng(number)
    if name == "gemma3":
        pixels, tokens = random.standard_normal((1, 3, 12, 12), np.float32), 9
        kwargs: dict[str, Any] = {"pixel_values": pixels}
    else:
        tokens = 4 + number
        # Two rows of patches; 2 × 2 of them make a token.
        at = np.stack(np.meshgrid(np.arange(2 * tokens), np.arange(2)), -1).reshape(1, -1, 2)
        kwargs = {"pixel_values": random.random((1, 4 * tokens, 48), np.float32), "image_position_ids": at}
    return ImageItem(f"{name}/{number}", np.zeros((1, 1, 3), np.uint8), kwargs, tokens)


Part = list[int] | MMItem | Sampled


def _joined(parts: tuple[Part, ...]) -> tuple[IntArray, list[bool], tuple[Placeholder, ...], tuple[MMItem, ...]]:
    ids: list[int] = []
    sampled: list[bool] = []
    placeholders = []
    for part in parts:
        if isinstance(part, MMItem):
            placeholders.append(Placeholder(len(ids), part.num_tokens, part.hash))
            ids += [IMAGE] * part.num_tokens
        else:
            ids += part.token_ids if isinstance(part, Sampled) else part
        sampled += [isinstance(part, Sampled)] * (len(ids) - len(sampled))
    images = tuple(part for part in parts if isinstance(part, MMItem))
    return np.array(ids, np.int64), sampled, tuple(placeholders), images


def prompt(*parts: Part) -> Prompt:
    """The parts one after another, images without any marks around them."""
    ids, _, placeholders, images = _joined(parts)
    return Prompt(ids, placeholders, images)


def sample(name: str, *parts: Part) -> TrainingSample:
    """A sample with random advantages where a `Sampled` part stands."""
    ids, sampled, placeholders, images = _joined(parts)
    mask = np.array(sampled)
    advantages = np.random.default_rng([ord(c) for c in name]).standard_normal(len(ids))
    return TrainingSample(
        rollout_id=name,
        token_ids=ids,
        mm_token_type_ids=mm_token_type_ids(len(ids), placeholders),
        loss_mask=mask,
        advantages=np.where(mask, advantages, 0).astype(np.float32),
        inference_logprobs=np.where(mask, -1, 0).astype(np.float32),
        versions=np.where(mask, 0, -1),
        placeholders=placeholders,
        mm_items=images,
    )


def plain_logits(model: Any, ids: IntArray, types: IntArray, images: tuple[MMItem, ...]) -> Tensor:
    """[L, vocabulary] in the model's dtype by transformers alone, with its own masks and its eager attention."""
    model.set_attn_implementation("eager")
    given: dict[str, Any] = {}
    if images:
        # Images of several sizes cannot stand in one array, so their features are handed over as the encoder's output.
        outputs = [
            model.model.get_image_features(
                **{
                    name: torch.from_numpy(array).to(model.dtype if array.dtype == np.float32 else torch.int64)
                    for name, array in item.mm_kwargs.items()
                }
            )
            for item in images
        ]
        features = [part.reshape(-1, part.shape[-1]) for out in outputs for part in out.pooler_output]
        is_list = isinstance(outputs[0].pooler_output, list | tuple)
        outputs[0].pooler_output = features if is_list else torch.stack(features)
        given["mm_encoder_outputs"] = {"image": outputs[0]}
    if hasattr(model.config, "vision_config"):
        name = "token_type_ids" if model.config.model_type == "gemma3" else "mm_token_type_ids"
        given[name] = torch.from_numpy(types)[None]
    logits: Tensor = model(input_ids=torch.from_numpy(ids)[None], use_cache=False, **given).logits[0]
    return logits
