"""The conversation of conversations.py as a `Prompt`, made by nothing of ours: the processor's own ids and arrays."""

from __future__ import annotations

from typing import Any

import numpy as np

from support.families import FAMILIES
from support.families.conversations import pictures, processed
from vlmrl.types import ImageItem, Placeholder, Prompt

ONE_IMAGE = {"llava_onevision"}
"""Families whose processor cuts an image into tiles only where it is the only one of a batch. Our renderer processes
each image alone, as vLLM does, so these are compared with one image."""

OF_THE_TEXT = {"input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"}
"""Outputs of a processor that are not about an image."""


def prompt_and_batch(name: str, processor: Any, image_token_id: int) -> tuple[Prompt, Any]:
    """The prompt, and the batch that transformers' own forward takes."""
    images = pictures()[:1] if name in ONE_IMAGE else pictures()
    batch = processed(processor, images)
    token_ids = batch["input_ids"][0].numpy()
    at = np.flatnonzero(token_ids == image_token_id)
    placeholders, items, used = [], [], 0
    for number, image in enumerate(images):
        item = _item(str(number), processor, FAMILIES[name], image, image_token_id)
        placeholders.append(_placeholder(at[used : used + item.num_tokens], item.hash))
        items.append(item)
        used += item.num_tokens
    assert used == len(at)
    return Prompt(token_ids, tuple(placeholders), tuple(items)), batch


def _item(hash: str, processor: Any, recipe: Any, image: Any, image_token_id: int) -> ImageItem:
    """One image, processed alone."""
    outputs = processor(text=[recipe.placeholder or recipe.image_token], images=[image], return_tensors="np")
    mm_kwargs = {key: np.asarray(value) for key, value in outputs.items() if key not in OF_THE_TEXT}
    tokens = int((np.asarray(outputs["input_ids"])[0] == image_token_id).sum())
    return ImageItem(hash, np.asarray(image.convert("RGB")), mm_kwargs, tokens)


def _placeholder(at: np.ndarray, hash: str) -> Placeholder:
    first, end = int(at[0]), int(at[-1]) + 1
    steps = np.diff(at)
    gaps = tuple((int(at[i]) - first + 1, int(steps[i]) - 1) for i in np.flatnonzero(steps > 1))
    return Placeholder(first, end - first, hash, gaps)
