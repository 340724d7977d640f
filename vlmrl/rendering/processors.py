"""Image processors: the model's own one as the `ImageStore` calls it, and the one that the `renderers` package gets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from PIL import Image as PILImage

from vlmrl.errors import fenced
from vlmrl.rendering.image_store import ImageStore
from vlmrl.rendering.images import ImageError, Pixels
from vlmrl.rendering.item_store import Processed
from vlmrl.rendering.messages import hash_of_stand_in

PlaceholderTokens: TypeAlias = Callable[[Mapping[str, np.ndarray], Any], int]
"""(mm_kwargs of one image, image processor) → placeholder tokens of the image. The model family defines it."""

ProcessedSize: TypeAlias = Callable[[Mapping[str, np.ndarray], Any], tuple[int, int] | None]
"""(mm_kwargs of one image, image processor) → (width, height) after processing; None where they do not tell. The model
family defines it."""


def untold_size(mm_kwargs: Mapping[str, np.ndarray], image_processor: Any) -> tuple[int, int] | None:
    """The `ProcessedSize` of a family that does not tell."""
    return None


class ProcessImage:
    """Runs the model's image processor on one image: pixels → (mm_kwargs, placeholder tokens)."""

    def __init__(
        self, image_processor: Any, placeholder_tokens: PlaceholderTokens, processed_size: ProcessedSize = untold_size
    ) -> None:
        """`image_processor` is None for a text-only model, which refuses images."""
        self._image_processor = image_processor
        self._placeholder_tokens = placeholder_tokens
        self._processed_size = processed_size

    def processed_size(self, mm_kwargs: Mapping[str, np.ndarray]) -> tuple[int, int] | None:
        """(width, height) of an image after processing, from what the processor made of it."""
        return self._processed_size(mm_kwargs, self._image_processor)

    def __call__(self, pixels: Pixels) -> Processed:
        if self._image_processor is None:
            raise ImageError("a text-only model was shown an image")
        height, width = pixels.shape[:2]
        with fenced(f"an image of {width} × {height} cannot be processed: the image processor", ImageError):
            # State the layout: transformers cannot infer it for an image that is 3 pixels high.
            output = self._image_processor(images=[pixels], return_tensors="np", input_data_format="channels_last")
        mm_kwargs = {name: np.ascontiguousarray(array) for name, array in output.items()}
        return Processed(mm_kwargs, self._placeholder_tokens(mm_kwargs, self._image_processor))


class StandInProcessor:
    """Takes the place of the model's processor in the package: given a stand-in, it returns what the image that the
    stand-in names was processed to."""

    def __init__(self, image_processor: Any, images: ImageStore) -> None:
        self.merge_size = image_processor.merge_size
        self._images = images

    @property
    def image_processor(self) -> StandInProcessor:
        """The package expects a processor that holds an image processor."""
        return self

    def __call__(self, images: Sequence[PILImage.Image], return_tensors: str) -> dict[str, np.ndarray]:
        (picture,) = images
        return self._images.known(hash_of_stand_in(picture)).mm_kwargs
