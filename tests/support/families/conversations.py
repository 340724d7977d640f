"""A conversation of two turns with two images, and what a family's processor makes of it."""

from __future__ import annotations

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


def conversation() -> list[dict[str, Any]]:
    """Two user turns with an image each; the second image stands between words."""
    return [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What colour is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
        {
            "role": "user",
            "content": [{"type": "text", "text": "And "}, {"type": "image"}, {"type": "text", "text": " this?"}],
        },
    ]


def processed(processor: Any, images: Sequence[Image]) -> Any:
    """The inputs of the model's forward for that conversation."""
    text = processor.apply_chat_template(conversation(), add_generation_prompt=True, tokenize=False)
    return processor(text=[text], images=[list(images)], return_tensors="pt", add_special_tokens=False)
