"""The quantities that a vision tower derives from image sizes, computed outside of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
)

from vlmrl.models.families.vision_geometry import SIZES, tower_arguments

CPU = torch.device("cpu")
GRID = torch.tensor([[1, 4, 6], [1, 2, 2], [2, 6, 4]])

Config: Any = Qwen2_5_VLVisionConfig
Windows: Any = Qwen2_5_VisionTransformerPretrainedModel


def test_a_tower_gives_the_same_features_with_precomputed_arguments(tiny_model: Callable[[], Any]) -> None:
    model = tiny_model()
    tower = model.get_encoder(modality="image")
    patches = torch.randn(int(GRID.prod(-1).sum()), tower.patch_embed.proj.weight[0].numel())
    arguments = tower_arguments(tower, {SIZES[0]: GRID}, CPU)
    assert arguments.keys() == {SIZES[0], "cu_seqlens", "position_ids", "interp_indices", "interp_weights"}
    with torch.no_grad():
        found = model.base_model.get_image_features(pixel_values=patches, **arguments, return_dict=True)
        wanted = model.base_model.get_image_features(pixel_values=patches, image_grid_thw=GRID, return_dict=True)
    for one, other in zip(found.pooler_output, wanted.pooler_output, strict=True):
        torch.testing.assert_close(one, other, rtol=0.0, atol=0.0)


def test_precomputed_arguments_are_those_of_the_tower_bit_for_bit(tiny_model: Callable[[], Any]) -> None:
    tower = tiny_model().get_encoder(modality="image")
    grid = torch.tensor([[1, 4, 6], [3, 2, 8], [1, 4, 6], [1, 6, 4], [2, 40, 38]])
    options = {"mode": tower.interpolation_mode, "align_corners": tower.interpolation_align_corners}
    indices, weights = get_vision_interpolation_indices_and_weights(
        grid, tower.num_grid_per_side, spatial_merge_size=tower.spatial_merge_size, **options
    )
    wanted = {
        SIZES[0]: grid,
        "cu_seqlens": get_vision_cu_seqlens(grid),
        "position_ids": get_vision_position_ids(grid, tower.spatial_merge_size),
        "interp_indices": indices,
        "interp_weights": weights,
    }
    for _ in range(2):  # the second time all sizes are known
        found = tower_arguments(tower, {SIZES[0]: grid}, CPU)
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            torch.testing.assert_close(found[name], tensor, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("name", [SIZES[0], "image_sizes"])
def test_a_tower_that_derives_other_quantities_gets_only_sizes(name: str) -> None:
    sizes = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    arguments = tower_arguments(Windows(Config(**sizes)), {name: GRID}, CPU)
    assert arguments.keys() == {name}
    assert torch.equal(arguments[name], GRID)
