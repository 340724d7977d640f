"""Random weights of the tiny checkpoints, scaled so that a tiny model is sure of its next token and sees its images."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Scales:
    """Standard deviations, each times 1/√(inputs of the matrix)."""

    embedding: float = 2.0
    """Of the embedding and the head. Families that multiply embeddings by √hidden (Gemma) want less."""
    matrix: float = 1.0
    image: float = 1.0
    """Of the last matrix between the vision tower and the language model."""
    image_matrix: str = ""
    """Regular expression of that matrix's name."""
    final_norm: float | None = None
    """The weight of the norm before the head, for a tied head with a small embedding; None keeps the default."""
    norms_scale_scores: bool = False
    """Whether norms of queries and keys have the weight head_dim^-1/4, for a family that leaves the usual factor
    1/√head_dim of the attention scores to them. With a weight of 1, scores reach 37 and a layer multiplies rounding
    by 4."""


JITTER = 0.1
"""Added to norms and biases, so that a bias that is forgotten on the way shows."""


def write_weights(
    config: PreTrainedConfig, folder: Path, scales: Scales, *, seed: int, dtype: str, has_images: bool
) -> None:
    """Write config.json and model.safetensors, under the names that published checkpoints of the family have.

    Values come from numpy: torch's normal numbers differ by rounding between processors, numpy's do not.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    auto: Any = AutoModelForImageTextToText if has_images else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = auto.from_config(config, dtype=torch.float32)
    random = np.random.default_rng(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = random.standard_normal(tuple(parameter.shape), np.float32)
            parameter.copy_(torch.from_numpy(_scaled(name, noise, parameter.numpy(), scales)))
    save(model.to(getattr(torch, dtype)), folder)


def save(model: PreTrainedModel, folder: Path) -> None:
    """Save `model` under published names.

    transformers leaves out the prefix of a tower (`vision_model.`) for a model that was not loaded from a file.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model._weight_conversions = get_model_conversion_mapping(model, add_legacy=False) or None  # type: ignore[assignment]
    model.save_pretrained(folder)
    if model.config.model_type == "qwen3_vl_moe":
        _transpose_experts(folder / "model.safetensors")


def _transpose_experts(file: Path) -> None:
    """Bring experts into the layout of published checkpoints. transformers transposes them where it loads them, and not
    where it saves; vLLM reads the published layout only."""
    from safetensors.torch import load_file, save_file

    weights = load_file(file)
    for name in weights:
        if ".experts." in name:
            weights[name] = weights[name].transpose(1, 2).contiguous()
    save_file(weights, file, metadata={"format": "pt"})


def _scaled(name: str, noise: Any, value: Any, scales: Scales) -> Any:
    if noise.ndim < 2:
        mean = value
        if _is_final_norm(name) and scales.final_norm:
            mean = np.full_like(value, scales.final_norm)
        elif scales.norms_scale_scores and re.search(r"\.[qk]_norm\.weight$", name):
            mean = np.full_like(value, len(value) ** -0.25)
        return mean + np.float32(JITTER) * noise
    if re.search(r"embed_tokens|lm_head|embedding\.weight|position_embedding", name):
        return noise * np.float32(scales.embedding / math.sqrt(noise.shape[-1]))
    factor = scales.image if scales.image_matrix and re.search(scales.image_matrix, name) else scales.matrix
    return noise * np.float32(factor / math.sqrt(math.prod(noise.shape[1:])))


def _is_final_norm(name: str) -> bool:
    return re.search(r"language_model\.norm\.weight$|text_model\.norm\.weight$|^model\.norm\.weight$", name) is not None
