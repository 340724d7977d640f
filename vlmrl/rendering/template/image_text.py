"""One image through the checkpoint's whole processor: its tensors, and the text that stands for it in a prompt."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image as PILImage

from vlmrl.errors import ConfigError, fenced
from vlmrl.rendering.images import ImageError, Pixels
from vlmrl.rendering.item_store import Processed

OF_TEXT = frozenset(
    {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "labels", "text_replacement_offsets"}
)
"""Outputs of a processor that describe the text and not the image."""


class ProcessWithText:
    """Runs the whole processor on one image and its placeholder.

    Not the image processor alone: some processors hand it settings of their own (Mistral 3: patch size times merge),
    and only the processor knows the replacement. One image at a time, so that none is padded to the size of another.
    """

    def __init__(self, processor: Any, image_token_id: int, settings: Mapping[str, Any]) -> None:
        """`settings` are `model.vlm.image_settings`: some processors have defaults of their own, which would replace
        those of the image processor (InternVL: `crop_to_patches`). Raises `ConfigError` for a processor without a
        placeholder."""
        placeholder = getattr(processor, "image_token", None)
        if not isinstance(placeholder, str):
            raise ConfigError(
                f"the processor {type(processor).__name__} has no image_token, so nothing says where an image stands "
                "in a prompt: choose a renderer that knows the family"
            )
        self.placeholder: str = placeholder
        self._processor = processor
        self._image_token_id = image_token_id
        self._settings = {"images_kwargs": dict(settings)} if settings else {}
        self._lock = threading.Lock()
        """A tokenizer must not be used by two threads at once."""

    def __call__(self, pixels: Pixels) -> Processed:
        height, width = pixels.shape[:2]
        with fenced(f"an image of {width} × {height} cannot be processed: the processor", ImageError), self._lock:
            output = self._processor(
                text=[self.placeholder],
                images=[[PILImage.fromarray(pixels)]],
                return_tensors="np",
                return_text_replacement_offsets=True,
                **self._settings,
            )
            ids = output["input_ids"][0].tolist()
            replacement = self._replacement(output, ids)
        num_tokens = ids.count(self._image_token_id)
        if num_tokens == 0:
            raise ImageError(
                f"an image of {width} × {height} becomes {replacement[:80]!r}, which has no token of id "
                f"{self._image_token_id} (model.vlm.image_token): set that to the token that gets the image's features"
            )
        mm_kwargs = {name: as_array(value) for name, value in output.items() if name not in OF_TEXT}
        return Processed(
            {name: array for name, array in mm_kwargs.items() if array is not None}, num_tokens, replacement
        )

    def surprise(self) -> str | None:
        """A sentence where an image becomes other tokens in the company of others; None where it does not. Raises
        `ConfigError` where what an image becomes depends on the text next to it."""
        picture = PILImage.fromarray(np.arange(96 * 224 * 3, dtype=np.uint32).astype(np.uint8).reshape(96, 224, 3))
        alone = self(np.asarray(picture)).replacement
        self._check_surroundings(picture, alone)
        with self._lock:
            output = self._processor(
                text=[2 * self.placeholder],
                images=[[picture, picture]],
                return_tensors="np",
                return_text_replacement_offsets=True,
                **self._settings,
            )
        offsets = output.get("text_replacement_offsets")
        if not offsets or all(each["replacement"] == alone for each in offsets[0]):
            return None
        return (
            f"the processor {type(self._processor).__name__} makes other tokens of an image in the company of others; "
            "here each image is processed alone, so that a later turn cannot change an earlier one"
        )

    def _check_surroundings(self, picture: PILImage.Image, alone: str) -> None:
        """A processor that does not say what it writes for an image may also change the text around it (Idefics 2)."""
        text = f"a{self.placeholder}b{2 * self.placeholder} c"
        with self._lock:
            output = self._processor(
                text=[text],
                images=[[picture] * 3],
                return_tensors="np",
                return_text_replacement_offsets=True,
                **self._settings,
            )
            tokenizer = self._processor.tokenizer
            expected = tokenizer(text.replace(self.placeholder, alone))["input_ids"]
        if not output.get("text_replacement_offsets") and output["input_ids"][0].tolist() != list(expected):
            raise ConfigError(
                f"the processor {type(self._processor).__name__} writes an image in another way depending on the text "
                "next to it, so a prompt could not be continued token by token: choose a renderer that knows the family"
            )

    def _replacement(self, output: Any, ids: list[int]) -> str:
        """What the processor wrote in place of the placeholder."""
        offsets = output.get("text_replacement_offsets")
        if offsets and offsets[0]:
            return str(offsets[0][0]["replacement"])
        # A processor that does not say: everything but the special tokens that the tokenizer itself puts around it.
        tokenizer = self._processor.tokenizer
        begin = len(tokenizer("")["input_ids"])
        text: str = tokenizer.decode(ids[begin:], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if tokenizer.encode(text, add_special_tokens=False) != ids[begin:]:
            raise ImageError(
                f"the processor {type(self._processor).__name__} does not say what it writes in place of an image, and "
                "its tokens are not those of their text: choose a renderer that knows the family"
            )
        return text


def as_array(value: Any) -> np.ndarray | None:
    """The value as an array; None for what is no number."""
    array = np.ascontiguousarray(value)
    return array if np.issubdtype(array.dtype, np.number) or array.dtype == np.bool_ else None
