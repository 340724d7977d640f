"""Makes vLLM's model count rotary positions as the trainer does.

transformers continues max(rows, columns) after a video begins, vLLM after the largest of its positions, which in a long
video is that of its last frame. The two agree for images, and for families that write a time before each frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from vlmrl.models.families.positions import SECONDS, mrope
from vlmrl.types import Placeholder


def count_as_the_trainer(model: Any, config: Any) -> None:
    """Replace `get_mrope_input_positions` of vLLM's `model`, if it has one; `config` is that of the checkpoint."""
    if not hasattr(model, "get_mrope_input_positions"):
        return
    merge, per_second = (getattr(config.vision_config, name, 1) for name in ("spatial_merge_size", "tokens_per_second"))

    def get_mrope_input_positions(input_tokens: Sequence[int], mm_features: Sequence[Any]) -> tuple[Any, int]:
        import torch

        positions = rotary_positions(len(input_tokens), mm_features, merge, per_second)
        return torch.from_numpy(positions), int(positions[:, -1].max()) + 1 - len(input_tokens)

    model.get_mrope_input_positions = get_mrope_input_positions


def rotary_positions(length: int, features: Sequence[Any], merge: int, per_second: int) -> np.ndarray:
    """int64 [3, length]; `features` are vLLM's `MultiModalFeatureSpec`."""
    placeholders: list[Placeholder] = []
    items: list[Any] = []
    for feature in sorted(features, key=lambda feature: feature.mm_position.offset):
        place, kind = feature.mm_position, feature.modality
        kwargs = {
            name: element.data.numpy()[None]
            for name, element in feature.data.items()
            if name in (f"{kind}_grid_thw", SECONDS)
        }
        placeholders.append(Placeholder(place.offset, place.length, "", (), kind))
        items.append(SimpleNamespace(modality=kind, mm_kwargs=kwargs))
    return np.ascontiguousarray(mrope(length, placeholders, items, merge, per_second)[1:])
