"""What transformers itself makes of messages: token ids by the chat template, pixels by the image processor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image as PILImage

from vlmrl.runs.doctor.evidence import images_of
from vlmrl.types import ImageItem, Message, Text


@dataclass(frozen=True)
class Reference:
    """transformers' tokenizer and image processor, loaded from the checkpoint again."""

    tokenizer: Any
    image_processor: Any
    """None for a text-only model."""
    image_token: str | None
    """The placeholder token's text; None for a text-only model."""

    @property
    def image_token_id(self) -> int | None:
        """The placeholder token's id; None for a text-only model."""
        if self.image_token is None:
            return None
        token_id: int = self.tokenizer.convert_tokens_to_ids(self.image_token)
        return token_id

    def token_ids(self, messages: Sequence[Message], images: Sequence[ImageItem]) -> list[int]:
        """The chat template's token ids for a conversation that the policy is to continue.

        Each image token is repeated as often as the image processor's grid says.
        """
        ids: list[int] = self.tokenizer.apply_chat_template(
            _chat(messages), add_generation_prompt=True, tokenize=True, return_dict=False
        )
        image_token_id = self.image_token_id
        if not images or image_token_id is None or ids.count(image_token_id) != len(images):
            return ids  # where the counts differ, the comparison that follows finds it
        counts = iter(self.process(images)["image_grid_thw"].prod(-1) // self.image_processor.merge_size**2)
        return [id for token in ids for id in [token] * (int(next(counts)) if token == image_token_id else 1)]

    def process(self, images: Sequence[ImageItem]) -> dict[str, np.ndarray]:
        """The image processor's output for the decoded images, in one call."""
        pictures = [PILImage.fromarray(image.pixels) for image in images]
        return dict(self.image_processor(images=pictures, return_tensors="np"))


def _chat(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages as a chat template takes them. Text without images is one string, which every template accepts."""
    return [
        {
            "role": message.role,
            "content": "".join(part.text for part in message.content if isinstance(part, Text))
            if not images_of([message])
            else [
                {"type": "text", "text": part.text} if isinstance(part, Text) else {"type": "image"}
                for part in message.content
            ],
        }
        for message in messages
    ]
