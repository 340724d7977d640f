"""Names and layouts of weights in published checkpoints, where transformers' modules have others."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vlmrl.errors import ModelError


def keep_published_layout(model: Any) -> None:
    """Have `published_weights` and `save_pretrained` transpose again what was transposed when `model` was loaded.

    transformers transposes a weight (the experts of Qwen3-VL MoE) where the file's shape is not the parameter's. On the
    way back it compares the parameter with itself, transposes nothing, and writes a file that vLLM cannot load.

    Raises `ModelError` for experts that are square: whether such a weight is transposed cannot be seen.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange, Transpose

    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:  # not loaded from a file; transformers adds no prefix then either
        mapping = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [each for each in mapping if not isinstance(each, PrefixChange)]
    conversions = copy.deepcopy(conversions)
    for conversion in conversions:
        for operation in getattr(conversion, "operations", ()):
            if isinstance(operation, Transpose):
                _refuse_square(model, conversion.target_patterns)
                operation.check_dims = False
    model._weight_conversions = conversions or None


def _refuse_square(model: Any, patterns: Sequence[str]) -> None:
    for name, parameter in model.named_parameters():
        rows, columns = parameter.shape[-2:] if parameter.ndim > 1 else (0, 1)
        if rows == columns and any(re.search(pattern, name) for pattern in patterns):
            raise ModelError(
                f"{name} is square ({rows} × {columns}), so nothing says whether a file holds it transposed, and the "
                "model might be another than the published one: choose a model whose experts have another width"
            )


def published_weights(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors`, by the names of `model`'s parameters, → by the names of the checkpoint that it was loaded from.

    transformers renames and fuses some weights when it loads (a vision tower loses its prefix, experts become one
    tensor). Other programs, such as vLLM, know the published names. This is what `save_pretrained` writes.
    """
    from transformers.core_model_loading import revert_weight_conversion

    with torch.no_grad():
        converted: dict[str, Tensor] = revert_weight_conversion(model, dict(tensors))
    return converted
