"""How many tokens a picture of 1024 × 1024 pixels becomes, by the family's own processor with published settings.

The tiny checkpoints of tests/support/families have tiny sizes of images, so a copy of such a checkpoint gets the
settings of a published one: `PUBLISHED`. The tokens are counted by what the template renderer counts with.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vlmrl.models.checkpoints.facts import read_facts
from vlmrl.models.checkpoints.load import load_processor
from vlmrl.rendering.template.image_text import ProcessWithText

SIDE = 1024


@dataclass(frozen=True)
class Published:
    """Settings of a published checkpoint that decide how many tokens an image becomes."""

    checkpoint: str
    image: Mapping[str, Any] = field(default_factory=dict)
    """Of the image processor."""
    processor: Mapping[str, Any] = field(default_factory=dict)


def area(least: int, most: int) -> dict[str, Any]:
    """`size` of processors that bound the area."""
    return {"size": {"shortest_edge": least, "longest_edge": most}}


def square(side: int) -> dict[str, Any]:
    return {"size": {"height": side, "width": side}}


QWEN2 = area(4 * 28**2, 16384 * 28**2)
QWEN3 = area(256**2, 4096**2)
ANYRES = [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)]
LLAVA_GRIDS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
CLIP_336 = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
CLIP_TOKENS = {"patch_size": 14, "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"}

PUBLISHED: dict[str, Published] = {
    "qwen2_vl": Published("Qwen/Qwen2-VL-7B-Instruct", QWEN2),
    "qwen2_5_vl": Published("Qwen/Qwen2.5-VL-7B-Instruct", QWEN2),
    "qwen3_vl": Published("Qwen/Qwen3-VL-4B-Instruct", QWEN3),
    "qwen3_vl_moe": Published("Qwen/Qwen3-VL-30B-A3B-Instruct", QWEN3),
    "qwen3_5": Published("Qwen/Qwen3.5-4B", QWEN3),
    "qwen3_5_moe": Published("Qwen/Qwen3.5-35B-A3B", QWEN3),
    "gemma3": Published("google/gemma-3-4b-it", {**square(896), "image_seq_length": 256}, {"image_seq_length": 256}),
    "gemma4": Published("google/gemma-4-E4B-it", {"max_soft_tokens": 280, "pooling_kernel_size": 3}),
    "gemma4_vision": Published("google/gemma-4-31B-it", {"max_soft_tokens": 280, "pooling_kernel_size": 3}),
    "internvl": Published("OpenGVLab/InternVL3-8B-hf", {**square(448), "max_patches": 12}, {"image_seq_length": 256}),
    "idefics3": Published(
        "HuggingFaceM4/Idefics3-8B-Llama3",
        {"size": {"longest_edge": 1456}, "max_image_size": {"longest_edge": 364}},
        {"image_seq_len": 169},
    ),
    "smolvlm": Published(
        "HuggingFaceTB/SmolVLM2-2.2B-Instruct",
        {"size": {"longest_edge": 1536}, "max_image_size": {"longest_edge": 384}},
        {"image_seq_len": 81},
    ),
    "llava": Published("llava-hf/llava-1.5-7b-hf", CLIP_336, CLIP_TOKENS),
    "llava_next": Published(
        "llava-hf/llava-v1.6-mistral-7b-hf", {**CLIP_336, "image_grid_pinpoints": LLAVA_GRIDS}, CLIP_TOKENS
    ),
    "llava_onevision": Published(
        "llava-hf/llava-onevision-qwen2-7b-ov-hf",
        {**square(384), "image_grid_pinpoints": ANYRES},
        {"num_image_tokens": 729},
    ),
    "glm4v": Published("zai-org/GLM-4.1V-9B-Thinking", area(112**2, 28**2 * 15000)),
    "mistral3": Published(
        "mistralai/Mistral-Small-3.1-24B-Instruct-2503",
        {"patch_size": 14, "size": {"longest_edge": 1540}},
        {"patch_size": 14},
    ),
    "pixtral": Published("mistral-community/pixtral-12b", {"patch_size": 16, "size": {"longest_edge": 1024}}),
    "aya_vision": Published(
        "CohereLabs/aya-vision-8b", {**square(364), "max_patches": 12}, {"img_size": 364, "patch_size": 14}
    ),
    "ovis2": Published("thisisiron/Ovis2-1B-hf", {**square(448), "max_patches": 9}, {"image_seq_length": 256}),
    "janus": Published("deepseek-community/Janus-Pro-7B", square(384), {"num_image_tokens": 576}),
}
"""Family → a published checkpoint of it and its settings, as its preprocessor_config.json and processor_config.json had
them when this was written."""


def image_tokens(family: str, checkpoint: Path, folder: Path) -> int:
    """Image tokens of one square picture. `folder` is where a copy of `checkpoint` gets the published settings."""
    published = PUBLISHED[family]
    shutil.copytree(checkpoint, folder)
    whole, own = folder / "processor_config.json", folder / "preprocessor_config.json"
    settings: dict[str, Any] = json.loads(whole.read_bytes()) if whole.exists() else {}
    settings |= published.processor
    if own.exists():
        own.write_text(json.dumps(json.loads(own.read_bytes()) | published.image))
    else:  # the image processor's settings are part of the processor's
        settings["image_processor"] = settings["image_processor"] | published.image
    whole.write_text(json.dumps(settings))
    processor = load_processor(folder)
    token = read_facts(str(folder)).image_token
    process = ProcessWithText(processor, processor.tokenizer.convert_tokens_to_ids(token), {})
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    return process(pixels).num_tokens
