"""The template renderer of a family's tiny checkpoint, and what transformers makes of the same conversations."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from support.families import FAMILIES
from support.families.loading import load_processor as load_reference
from vlmrl.config.model import ModelConfig, VLMConfig
from vlmrl.config.orchestrator import RendererConfig
from vlmrl.models.checkpoints.load import load_eos_ids, load_processor, load_tokenizer
from vlmrl.models.families import family_of
from vlmrl.rendering.renderer import FamilyRenderer, make_renderer
from vlmrl.types import Image, IntArray, Message, Prompt, Text

REFUSED = {"idefics2"}
"""Families whose processor changes the text around an image."""

WITH_IMAGES = [
    name
    for name, recipe in FAMILIES.items()
    if recipe.image_token is not None
    and name not in REFUSED
    and (find_spec("torchvision") is not None or not recipe.needs_torchvision)
]


def template_renderer(folder: Path, image_token: str | None, config: RendererConfig | None = None) -> FamilyRenderer:
    """The renderer `template` of the checkpoint in `folder`."""
    vlm = None
    if image_token is not None:
        vlm = VLMConfig("any", renderers=["template"], positions="sequential", image_token=image_token)
    tokenizer, family = load_tokenizer(folder), family_of(vlm)
    processor = load_processor(folder) if vlm is not None else None
    return make_renderer(
        config or RendererConfig(name="template"),
        ModelConfig(name=str(folder), vlm=vlm),
        tokenizer,
        processor.image_processor if processor is not None else None,
        len(tokenizer),
        family.placeholder_tokens,
        family.processed_size,
        processor=processor,
        eos_ids=load_eos_ids(folder),
    )


class ByTransformers:
    """transformers' processor of a folder, as `AutoProcessor` makes it, or its tokenizer for a text model."""

    def __init__(self, folder: Path, *, has_images: bool, in_parts: bool) -> None:
        """`in_parts`: the template reads every message as a list of parts, also one of text alone."""
        self._in_parts = in_parts
        self.processor = load_reference(folder) if has_images else None
        self.tokenizer = self.processor.tokenizer if self.processor is not None else load_tokenizer(folder)

    def inputs(self, messages: Sequence[Message], *, generate: bool, alone: bool = False) -> Any:
        """What `apply_chat_template` makes of a conversation; `alone` processes each image as if it were the only one
        of its conversation, for processors that make a difference."""
        chat, images = _chat(messages, in_parts=self._in_parts)
        if self.processor is None or not alone:
            return (self.processor or self.tokenizer).apply_chat_template(
                chat, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=generate
            )
        text = self.processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=generate)
        return self.processor(text=[text], images=images or None, return_tensors="pt", add_special_tokens=False)


def _chat(messages: Sequence[Message], *, in_parts: bool) -> tuple[list[dict[str, Any]], list[Any]]:
    """(the messages for a template, their images); messages of text alone are strings unless `in_parts`."""
    chat: list[dict[str, Any]] = []
    images: list[Any] = []
    for message in messages:
        own = [part.source for part in message.content if isinstance(part, Image)]
        parts = [
            {"type": "text", "text": part.text} if isinstance(part, Text) else {"type": "image", "image": part.source}
            for part in message.content
        ]
        text = "".join(part.text for part in message.content if isinstance(part, Text))
        chat.append({"role": message.role, "content": parts if own or in_parts else text})
        images += own
    return chat, images


def ids_of(inputs: Any) -> list[int]:
    ids: list[int] = inputs["input_ids"][0].tolist()
    return ids


def image_positions(prompt: Prompt) -> IntArray:
    """Positions of the tokens that get image features, by the placeholders."""
    places = [place.offset + np.flatnonzero(place.has_feature) for place in prompt.placeholders]
    return np.concatenate([np.empty(0, np.int64), *places])
