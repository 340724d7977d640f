"""A conversation of two turns with two images, and what a family's processor makes of it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL.Image import Image, fromarray

SIZES = ((84, 140), (96, 96))
"""Height and width of the two images."""


def pictures(seed: int = 0) -> list[Image]:
    """Two images of noise, of different sizes."""
    random = np.random.default_rng(seed)
    return [fromarray(random.integers(0, 256, (*size, 3), np.uint8)) for size in SIZES]


def conversation(images: Sequence[Image]) -> list[dict[str, Any]]:
    """Two user turns with an image each; the second image stands between words. With one image, the first turn."""
    opening = {
        "role": "user",
        "content": [{"type": "image", "image": images[0]}, {"type": "text", "text": "What colour is it?"}],
    }
    if len(images) == 1:
        return [opening]
    return [
        opening,
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "And "},
                {"type": "image", "image": images[1]},
                {"type": "text", "text": " this?"},
            ],
        },
    ]


def processed(processor: Any, images: Sequence[Image]) -> Any:
    """The inputs of the model's forward for that conversation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # GLM's processor gives numpy a tensor without `copy`
        return processor.apply_chat_template(
            conversation(images), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
