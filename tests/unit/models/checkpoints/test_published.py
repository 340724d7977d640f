"""Weights under the names and in the layouts of published checkpoints: what was loaded comes back bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from support.families import FAMILIES
from vlmrl.config.model import ModelConfig, VLMConfig
from vlmrl.models.checkpoints.load import load_model
from vlmrl.models.checkpoints.published import published_weights


def loaded(name: str, folder: Path) -> Any:
    recipe = FAMILIES[name]
    vlm = VLMConfig(recipe.model_type, ["template"], "sequential", recipe.image_token or "")
    return load_model(folder, ModelConfig(name=str(folder), vlm=vlm if recipe.image_token is not None else None))


@pytest.mark.parametrize("name", FAMILIES)
def test_what_was_loaded_comes_back(family_folder: Callable[[str], Path], name: str) -> None:
    wanted = load_file(family_folder(name) / "model.safetensors")
    model = loaded(name, family_folder(name))
    found = published_weights(model, dict(model.named_parameters()))
    assert found.keys() <= wanted.keys()
    buffers = {key for key, _ in model.named_buffers()}
    assert wanted.keys() - found.keys() <= buffers, "a buffer is never trained"
    for key, weight in found.items():
        assert torch.equal(weight, wanted[key]), key


def test_experts_are_transposed_in_a_saved_folder(family_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """vLLM reads Qwen3-VL MoE's experts as [experts, inputs, outputs]; transformers has [experts, outputs, inputs]."""
    model = loaded("qwen3_vl_moe", family_folder("qwen3_vl_moe"))
    model.save_pretrained(tmp_path)
    text = model.config.text_config
    name = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    assert load_file(tmp_path / "model.safetensors")[name].shape == (
        text.num_experts,
        text.hidden_size,
        2 * text.moe_intermediate_size,
    )
