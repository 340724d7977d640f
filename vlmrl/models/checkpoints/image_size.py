"""Sizes of images and videos: `model.vlm.min_pixels`, `max_pixels`, `image_settings` and `video` on a checkpoint's
processors.

The renderer alone processes images, so engine and trainer get what these settings make. A vLLM server that makes images
again from pictures gets the settings with each of them (`inference/vllm/image_fields.py`).
"""

from __future__ import annotations

from math import isqrt
from typing import Any

import numpy as np

from vlmrl.config.model import VideoConfig, VLMConfig
from vlmrl.errors import ConfigError, headline

AREA = ("shortest_edge", "longest_edge")
"""Keys of `size` which, in processors that bound the area of an image, are its least and its most pixels."""


def size_settings(vlm: VLMConfig | None) -> dict[str, Any]:
    """The settings of `vlm` that are set, by their keys."""
    if vlm is None:
        return {}
    values = {"min_pixels": vlm.min_pixels, "max_pixels": vlm.max_pixels, "image_settings": dict(vlm.image_settings)}
    return {key: value for key, value in values.items() if value}


def resized(image_processor: Any, vlm: VLMConfig) -> Any:
    """The image processor with the settings of `model.vlm`. Raises `ConfigError` for those that it does not have."""
    known = image_processor.to_dict()
    if unknown := sorted(vlm.image_settings.keys() - known.keys()):
        raise ConfigError(
            f"model.vlm.image_settings.{unknown[0]} is no setting of {type(image_processor).__name__}, so it would "
            f"change nothing: its settings are {', '.join(sorted(known))}"
        )
    if vlm.image_settings:
        image_processor = _changed(image_processor, vlm.image_settings)
    if vlm.min_pixels is None and vlm.max_pixels is None:
        return image_processor
    size = image_processor.to_dict().get("size")
    if isinstance(size, dict) and set(AREA) <= size.keys():
        least, most = (
            size[key] if value is None else value
            for key, value in zip(AREA, (vlm.min_pixels, vlm.max_pixels), strict=True)
        )
        if least > most:
            raise ConfigError(
                f"model.vlm.min_pixels={least} is above model.vlm.max_pixels={most}, so no image has an allowed size: "
                "lower the first or raise the second"
            )
        bounded = _changed(image_processor, {"size": {**size, **dict(zip(AREA, (least, most), strict=True))}})
        if _bounds_area(bounded, least, most):
            return bounded
    raise ConfigError(
        f"model.vlm.max_pixels and min_pixels do not bound {type(image_processor).__name__}, which has other settings "
        f"for the size of an image (size={size}): set these in model.vlm.image_settings instead"
    )


def resized_video(video_processor: Any, config: VideoConfig) -> Any:
    """The video processor with the sizes of `model.vlm.video`. Raises `ConfigError` for a processor without them."""
    bounds = {AREA[0]: config.min_pixels, AREA[1]: config.max_pixels}
    given = {key: value for key, value in bounds.items() if value is not None}
    if not given:
        return video_processor
    size = video_processor.to_dict().get("size")
    if not isinstance(size, dict) or not set(AREA) <= size.keys():
        raise ConfigError(
            f"model.vlm.video.min_pixels and max_pixels do not bound {type(video_processor).__name__}, which has other "
            f"settings for the size of a video (size={size}): leave them null"
        )
    if (least := {**size, **given}[AREA[0]]) > (most := {**size, **given}[AREA[1]]):
        raise ConfigError(
            f"the least pixels of a video, {least}, are above the most, {most}, so no video has an allowed size: set "
            "both model.vlm.video.min_pixels and model.vlm.video.max_pixels"
        )
    return type(video_processor)(**{**video_processor.to_dict(), "size": {**size, **given}})


def _changed(image_processor: Any, settings: dict[str, Any]) -> Any:
    try:
        return type(image_processor)(**{**image_processor.to_dict(), **settings})
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"model.vlm.image_settings={settings} does not fit {type(image_processor).__name__} ({headline(error)}), "
            "so no image could be processed: correct the value"
        ) from error


def _bounds_area(image_processor: Any, least: int, most: int) -> bool:
    """Whether an image larger than `most` pixels becomes as large as one of `most` pixels, and a smaller one does not.

    Measured, because other processors read the same keys as lengths of edges, and some make every image one size.
    """
    side = isqrt(most)
    large, largest = _elements(image_processor, side), _elements(image_processor, 3 * side)
    small = _elements(image_processor, max(isqrt(least), side // 3, 1))
    return largest < 1.5 * large and (small < large or 2 * least > most)


def _elements(image_processor: Any, side: int) -> int:
    """Numbers that a square picture becomes."""
    picture = np.zeros((side, side, 3), np.uint8)
    output = image_processor(images=[picture], return_tensors="np", input_data_format="channels_last")
    return int(output["pixel_values"].size)
