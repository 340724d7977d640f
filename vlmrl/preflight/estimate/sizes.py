"""The model's numbers before it is loaded, and the constants of the estimates.

    model.tiny                     its sizes
    model.size                     its numbers, where the weights are random or the checkpoint is the one of that size
    a folder, or the hub's cache   config.json
    a hub name that is not here    parameters, from the name ("…-4B-…"); nothing else

No weights are loaded, and nothing is downloaded.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmrl.config.model import Init, ModelConfig
from vlmrl.models.checkpoints.tiny import largest_vocabulary
from vlmrl.models.families import family_of
from vlmrl.models.families.base import Family, ImageBounds

TURN_FRAME = 10
"""Tokens that a chat template puts around the messages of a turn."""

CHARACTERS_PER_TOKEN, TINY_CHARACTERS_PER_TOKEN = 4, 2
"""Characters of English per token: under a large vocabulary, and under the one of `model.tiny`."""


@dataclass(frozen=True)
class TextSizes:
    """Sizes of the language model."""

    layers: int
    hidden: int
    intermediate: int
    """Width of the MLP that a token goes through; for a mixture of experts, the sum over its active experts."""
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    has_experts: bool = False
    """Whether the MLP is a mixture of experts."""
    stateful_layers: int = 0
    """Of `layers`, those that carry a state from token to token and have no keys."""
    conv_state: int = 0
    """Numbers in the windows of their convolutions, all layers together."""
    recurrent_state: int = 0
    """Numbers of their recurrent states, float32, all layers together."""


@dataclass(frozen=True)
class Sizes:
    """What is known about a model; None where it is not known."""

    source: str
    """Where the numbers come from, for the reader of the plan."""
    parameters: int | None
    vision_parameters: int | None
    """How many of `parameters` belong to the vision tower."""
    text: TextSizes | None
    image_bounds: ImageBounds | None
    """Bounds of an image's area; None where they are not known."""


def find_sizes(config: ModelConfig) -> Sizes:
    """The sizes of `config`; reads a folder's config.json, loads and downloads nothing."""
    family = family_of(config.vlm)
    bounds = family.image_bounds(config)
    if config.tiny is not None and family.recipe is not None:
        numbers = family.tiny_config(config.tiny, largest_vocabulary(family.recipe, config.tiny))
        return from_numbers(numbers, "model.tiny", family, bounds)
    size = config.size
    if size is not None and (config.init is Init.random or config.name == size.name):
        numbers = {
            "text_config": size.text,
            "vision_config": size.vision,
            "tie_word_embeddings": size.tie_word_embeddings,
        }
        return from_numbers(numbers, f"model.size of {size.name}", family, bounds)
    folder = _folder(config)
    if folder is None:
        return Sizes(f"the name {config.name}", parameters_by_name(config.name), None, None, bounds)
    numbers, preprocessor = (_read(folder / name) for name in ("config.json", "preprocessor_config.json"))
    if bounds is not None:
        edges = preprocessor.get("size")
        least, most = (
            edges.get(name) if isinstance(edges, dict) else None for name in ("shortest_edge", "longest_edge")
        )
        bounds = ImageBounds(
            least if isinstance(least, int) else bounds.least, most if isinstance(most, int) else bounds.most
        )
    sizes = from_numbers(numbers, str(folder / "config.json"), family, bounds)
    from vlmrl.models.checkpoints.load import count_parameters

    counted = count_parameters(folder)  # a formula is right for the families that it was made for
    return (
        sizes if counted is None else dataclasses.replace(sizes, source=f"the weights in {folder}", parameters=counted)
    )


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; empty where the file is missing or corrupt, which loading the model reports."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _folder(config: ModelConfig) -> Path | None:
    from vlmrl.models.checkpoints.load import cached_folder

    folder = cached_folder(config.name)
    return folder if folder is not None and (folder / "config.json").is_file() else None


def from_numbers(numbers: Mapping[str, Any], source: str, family: Family, image_bounds: ImageBounds | None) -> Sizes:
    """The sizes in the numbers of a config.json; all None for a family that names its numbers differently."""
    try:
        text, vision = numbers.get("text_config", numbers), numbers.get("vision_config")
        tied = numbers.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
        tower = family.vision_parameters(vision) if vision is not None else 0
        if tower is None:
            return Sizes(source, None, None, None, image_bounds)
        parameters = _text_parameters(text, tied=tied) + tower
        shape = TextSizes(
            layers=text["num_hidden_layers"],
            hidden=text["hidden_size"],
            intermediate=text["num_experts_per_tok"] * text["moe_intermediate_size"]
            if text.get("num_experts")
            else text["intermediate_size"],
            heads=text["num_attention_heads"],
            kv_heads=text["num_key_value_heads"],
            head_dim=_head_dim(text),
            vocabulary=text["vocab_size"],
            has_experts=bool(text.get("num_experts")),
            **_states(text),
        )
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError):  # another family's, or no numbers
        return Sizes(source, None, None, None, image_bounds)
    return Sizes(source, parameters, tower, shape, image_bounds)


def _states(text: Mapping[str, Any]) -> dict[str, int]:
    """What gated delta nets and short convolutions carry, by the names of transformers; other layers have keys."""
    kinds = list(text.get("layer_types") or ())
    nets = kinds.count("linear_attention") if "linear_num_value_heads" in text else 0
    convolutions = kinds.count("conv") if "conv_L_cache" in text else 0
    window = recurrent = 0
    if nets:
        heads, size = int(text["linear_num_value_heads"]), int(text["linear_key_head_dim"])
        values = heads * int(text["linear_value_head_dim"])
        recurrent = size * values
        window = (2 * int(text["linear_num_key_heads"]) * size + values) * int(text["linear_conv_kernel_dim"])
    short = int(text["hidden_size"]) * int(text["conv_L_cache"]) if convolutions else 0
    return {
        "stateful_layers": nets + convolutions,
        "conv_state": nets * window + convolutions * short,
        "recurrent_state": nets * recurrent,
    }


def _head_dim(text: Mapping[str, Any]) -> int:
    return int(text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"])


def _text_parameters(text: Mapping[str, Any], *, tied: bool) -> int:
    """Parameters of Qwen3, dense or a mixture of experts: no biases, a norm per head on queries and keys."""
    width, head_dim = text["hidden_size"], _head_dim(text)
    queries, keys = text["num_attention_heads"] * head_dim, text["num_key_value_heads"] * head_dim
    attention = width * (2 * queries + 2 * keys) + 2 * head_dim
    if text.get("num_experts"):
        mlp = text["num_experts"] * (3 * width * text["moe_intermediate_size"] + width)
    else:
        mlp = 3 * width * text["intermediate_size"]
    embedding = text["vocab_size"] * width
    return int(text["num_hidden_layers"] * (attention + mlp + 2 * width) + width + embedding * (1 if tied else 2))


def parameters_by_name(name: str) -> int | None:
    """Parameters by the name of a model ("…-4B-…"); None where the name has no such part.

    >>> parameters_by_name("Qwen/Qwen3-VL-4B-Instruct"), parameters_by_name("org/model-1.5b"), parameters_by_name("x")
    (4000000000, 1500000000, None)
    """
    found = re.search(r"(?<![\w.])(\d+(?:\.\d+)?)b(?![a-z0-9])", name.rpartition("/")[2], re.IGNORECASE)
    return int(float(found[1]) * 1e9) if found else None
