"""The tiny model's renderer, without its weights."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from vlmrl.config.model import ModelConfig, TinyConfig, VLMConfig
from vlmrl.models.families import family_of
from vlmrl.rendering.renderer import Renderer
from vlmrl.types import IntArray, Message, Prompt

QWEN3_VL = VLMConfig(family="qwen3_vl", renderers=["qwen3-vl"], positions="mrope", image_token="<|image_pad|>")
MODEL = ModelConfig(name="tiny", vlm=QWEN3_VL, tiny=TinyConfig())
PLACEHOLDER_TOKENS = family_of(QWEN3_VL).placeholder_tokens
VOCAB_SIZE = 448


def first(renderer: Renderer, messages: Sequence[Message]) -> Prompt:
    return asyncio.run(renderer.first_turn(messages))


def following(
    renderer: Renderer, previous: Prompt, ids: IntArray, history: Sequence[Message], new: Sequence[Message]
) -> tuple[Prompt, bool]:
    return asyncio.run(renderer.next_turn(previous, ids, history, new))
