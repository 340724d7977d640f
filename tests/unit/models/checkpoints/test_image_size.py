"""`model.vlm.min_pixels`, `max_pixels` and `image_settings`, on the image processors of several families."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlmrl.config.model import VLMConfig
from vlmrl.errors import ConfigError
from vlmrl.models.checkpoints.load import load_image_processor, load_processor
from vlmrl.rendering.template.image_text import ProcessWithText

LARGE, SMALL = np.zeros((600, 600, 3), np.uint8), np.zeros((30, 30, 3), np.uint8)


def vlm(**settings: Any) -> VLMConfig:
    made = VLMConfig("any", renderers=["template"], positions="sequential", image_token="x")
    for name, value in settings.items():
        setattr(made, name, value)
    return made


def area(image_processor: Any, picture: np.ndarray) -> int:
    (grid,) = image_processor(images=[picture], return_tensors="np")["image_grid_thw"]
    return int(grid.prod()) * int(image_processor.patch_size) ** 2


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "glm4v"])
def test_areas_are_bounded(family_folder: Callable[[str], Path], name: str) -> None:
    # Qwen counts the pixels of one frame and GLM those of two copies of it, so half is allowed there.
    bounded: Any = load_image_processor(family_folder(name), vlm(min_pixels=128 * 128, max_pixels=256 * 256))
    assert 256 * 256 // 3 < area(bounded, LARGE) <= 256 * 256
    assert area(bounded, SMALL) >= 128 * 128 // 2
    assert area(bounded, LARGE) < area(load_image_processor(family_folder(name)), LARGE)


@pytest.mark.parametrize("name", ["gemma3", "smolvlm", "mistral3", "internvl", "llava_onevision"])
def test_a_processor_without_an_area_is_refused(family_folder: Callable[[str], Path], name: str) -> None:
    with pytest.raises(ConfigError, match=r"max_pixels and min_pixels do not bound .* set these in"):
        load_image_processor(family_folder(name), vlm(max_pixels=96 * 96))


def test_settings_by_the_names_of_the_processor(family_folder: Callable[[str], Path]) -> None:
    folder = family_folder("internvl")

    def tiles(**settings: Any) -> int:
        processor = load_processor(folder, vlm(image_settings=settings))
        token = processor.tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
        return len(ProcessWithText(processor, token, settings)(LARGE).mm_kwargs["pixel_values"])

    assert tiles() == 5
    assert tiles(crop_to_patches=False) == 1, "the processor has a default of its own"
    assert tiles(max_patches=3) == 1, "a square is cut into 1 or into 2 x 2"
    with pytest.raises(ConfigError, match=r"image_settings\.max_tiles is no setting of .*: its settings are "):
        load_image_processor(folder, vlm(image_settings={"max_tiles": 2}))


def test_bounds_that_exclude_each_other(family_folder: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match=r"min_pixels=200 is above model\.vlm\.max_pixels=100"):
        load_image_processor(family_folder("qwen3_vl"), vlm(min_pixels=200, max_pixels=100))
