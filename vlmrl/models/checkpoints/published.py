"""Names of weights in published checkpoints, where transformers' modules have others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def published_weights(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors`, by the names of `model`'s parameters, → by the names of the checkpoint that it was loaded from.

    transformers renames and fuses some weights when it loads (a vision tower loses its prefix, experts become one
    tensor). Other programs, such as vLLM, know the published names. This is what `save_pretrained` writes.
    """
    from transformers.core_model_loading import revert_weight_conversion

    with torch.no_grad():
        converted: dict[str, Tensor] = revert_weight_conversion(model, dict(tensors))
    return converted
