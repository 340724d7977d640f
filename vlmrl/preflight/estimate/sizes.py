"""The model's numbers, before it is loaded.

    model.tiny                     its sizes
    model.size                     its numbers, where the weights are random or the checkpoint is the one of that size
    a folder, or the hub's cache   config.json
    a hub name that is not here    parameters, from the name ("…-4B-…"); nothing else

Nothing is loaded, and nothing downloaded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmrl.config.model import Init, ModelConfig, TinyConfig
from vlmrl.models.checkpoints.text_files import (
    ATOMIC_TOKENS,
    MAX_PIXELS,
    MERGE_SIZE,
    PATCH_SIZE,
    SPECIAL_TOKENS,
    TEMPORAL_PATCH_SIZE,
)
from vlmrl.models.checkpoints.tiny import MAX_PIXELS as TINY_MAX_PIXELS
from vlmrl.models.checkpoints.tiny import VOCAB_MULTIPLE

LEAST_PIXELS, RELEASED_LEAST_PIXELS = 32 * 32, 256 * 256
"""An image of fewer is scaled up to it: by what is made here, and by the released checkpoints."""


@dataclass(frozen=True)
class TextSizes:
    """The language model."""

    layers: int
    hidden: int
    intermediate: int
    """Width of the MLP that a token goes through; of a mixture, of its active experts together."""
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int


@dataclass(frozen=True)
class Sizes:
    """What is known of a model."""

    source: str
    """Where from, for the reader."""
    parameters: int | None
    vision_parameters: int | None
    """Of these, the vision tower's."""
    text: TextSizes | None
    image_pixels: tuple[int, int] | None
    """Least and most pixels of an image: smaller ones are scaled up, larger ones down."""


def image_bounds(config: ModelConfig) -> tuple[int, int] | None:
    """Least and most pixels of an image, as far as the config says; None of another family than Qwen3-VL."""
    if config.vlm is None or not config.vlm.family.startswith("qwen3_vl"):
        return None
    made_here = config.tiny is not None or config.init is Init.random
    return (LEAST_PIXELS if made_here else RELEASED_LEAST_PIXELS, TINY_MAX_PIXELS if config.tiny else MAX_PIXELS)


def find_sizes(config: ModelConfig) -> Sizes:
    """The sizes of `config`; reads a folder's config.json, loads and downloads nothing."""
    pixels = image_bounds(config)
    if config.tiny is not None:
        return from_numbers(tiny_numbers(config.tiny), "model.tiny", pixels)
    size = config.size
    if size is not None and (config.init is Init.random or config.name == size.name):
        numbers = {
            "text_config": size.text,
            "vision_config": size.vision,
            "tie_word_embeddings": size.tie_word_embeddings,
        }
        return from_numbers(numbers, f"model.size of {size.name}", pixels)
    folder = _folder(config)
    if folder is None:
        return Sizes(f"the name {config.name}", parameters_by_name(config.name), None, None, pixels)
    numbers, preprocessor = (_read(folder / name) for name in ("config.json", "preprocessor_config.json"))
    if pixels:
        edges = preprocessor.get("size") or {}
        pixels = (edges.get("shortest_edge", pixels[0]), edges.get("longest_edge", pixels[1]))
    return from_numbers(numbers, str(folder / "config.json"), pixels)


def _read(path: Path) -> dict[str, Any]:
    """Of a file that is missing or corrupt nothing is known here; who loads the model says so."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _folder(config: ModelConfig) -> Path | None:
    from vlmrl.models.checkpoints.load import cached_folder

    folder = cached_folder(config.name)
    return folder if folder is not None and (folder / "config.json").is_file() else None


def tiny_numbers(tiny: TinyConfig) -> dict[str, Any]:
    """`model.tiny` as a config.json has it. The vocabulary counts all merges that may be learned."""
    tokens = 256 + tiny.bpe_merges + len(SPECIAL_TOKENS) + len(ATOMIC_TOKENS)
    return {
        "text_config": {
            **{name: getattr(tiny, name) for name in ("hidden_size", "intermediate_size", "num_hidden_layers")},
            **{name: getattr(tiny, name) for name in ("num_attention_heads", "num_key_value_heads", "head_dim")},
            "vocab_size": -(-tokens // VOCAB_MULTIPLE) * VOCAB_MULTIPLE,
        },
        "vision_config": {
            "depth": tiny.vision_depth,
            "hidden_size": tiny.vision_hidden_size,
            "intermediate_size": tiny.vision_intermediate_size,
            "out_hidden_size": tiny.hidden_size,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": tiny.deepstack_visual_indexes,
            "patch_size": PATCH_SIZE,
            "spatial_merge_size": MERGE_SIZE,
            "temporal_patch_size": TEMPORAL_PATCH_SIZE,
        },
        "tie_word_embeddings": True,
    }


def from_numbers(numbers: Mapping[str, Any], source: str, image_pixels: tuple[int, int] | None) -> Sizes:
    """From what a config.json says. Of a family that spells its numbers otherwise nothing is known."""
    text, vision = numbers.get("text_config", numbers), numbers.get("vision_config")
    tied = numbers.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
    try:
        tower = _vision_parameters(vision) if vision is not None else 0
        parameters = _text_parameters(text, tied=tied) + tower
        shape = TextSizes(
            layers=text["num_hidden_layers"],
            hidden=text["hidden_size"],
            intermediate=text["num_experts_per_tok"] * text["moe_intermediate_size"]
            if "num_experts" in text
            else text["intermediate_size"],
            heads=text["num_attention_heads"],
            kv_heads=text["num_key_value_heads"],
            head_dim=_head_dim(text),
            vocabulary=text["vocab_size"],
        )
    except KeyError:
        return Sizes(source, None, None, None, image_pixels)
    return Sizes(source, parameters, tower, shape, image_pixels)


def _head_dim(text: Mapping[str, Any]) -> int:
    return int(text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"])


def _text_parameters(text: Mapping[str, Any], *, tied: bool) -> int:
    """Of Qwen3, dense or a mixture of experts: no biases, a norm per head on queries and keys."""
    width, head_dim = text["hidden_size"], _head_dim(text)
    queries, keys = text["num_attention_heads"] * head_dim, text["num_key_value_heads"] * head_dim
    attention = width * (2 * queries + 2 * keys) + 2 * head_dim
    if "num_experts" in text:
        mlp = text["num_experts"] * (3 * width * text["moe_intermediate_size"] + width)
    else:
        mlp = 3 * width * text["intermediate_size"]
    embedding = text["vocab_size"] * width
    return int(text["num_hidden_layers"] * (attention + mlp + 2 * width) + width + embedding * (1 if tied else 2))


def _vision_parameters(vision: Mapping[str, Any]) -> int:
    """Of Qwen3-VL's tower: patches, positions, blocks with biases, a merger for the output and each deepstack level."""
    width, inner = vision["hidden_size"], vision["intermediate_size"]
    merged = width * vision["spatial_merge_size"] ** 2
    patch = 3 * vision["temporal_patch_size"] * vision["patch_size"] ** 2
    block = 4 * (width * width + width) + 2 * width * inner + inner + width + 4 * width
    merger = merged * merged + merged + merged * vision["out_hidden_size"] + vision["out_hidden_size"]
    levels = len(vision["deepstack_visual_indexes"])
    return int(
        patch * width
        + width
        + vision["num_position_embeddings"] * width
        + vision["depth"] * block
        + merger
        + 2 * width
        + levels * (merger + 2 * merged)
    )


def parameters_by_name(name: str) -> int | None:
    """What a model's name says about its parameters; None where it says nothing.

    >>> parameters_by_name("Qwen/Qwen3-VL-4B-Instruct"), parameters_by_name("org/model-1.5b"), parameters_by_name("x")
    (4000000000, 1500000000, None)
    """
    found = re.search(r"(?<![\w.])(\d+(?:\.\d+)?)b(?![a-z0-9])", name.rpartition("/")[2], re.IGNORECASE)
    return int(float(found[1]) * 1e9) if found else None
