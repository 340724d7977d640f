"""The model's numbers against the model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import helpers
import pytest

from vlmrl.models.config import ModelConfig
from vlmrl.plan.sizes import QWEN3_VL_PIXELS, TINY_PIXELS, find_sizes


def test_the_parameters_of_the_tiny_model_are_counted_exactly(tiny_model: Callable[[], Any], tiny_folder: Path) -> None:
    model = tiny_model()
    config = helpers.TINY
    found = find_sizes(ModelConfig(str(tiny_folder), config.dtype, config.device, config.vlm))
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.vision_parameters == sum(p.numel() for p in model.base_model.visual.parameters())
    assert found.text is not None
    assert found.text.vocabulary == model.get_input_embeddings().num_embeddings
    assert found.image_pixels == TINY_PIXELS
    assert found.source == str(tiny_folder / "config.json")


def test_before_it_is_built_they_are_those_of_the_config(run_config: Callable[..., Any]) -> None:
    found = find_sizes(run_config().model)
    assert (found.parameters, found.source) == (428_480, "model.tiny")


def test_a_released_checkpoint_by_its_numbers(tmp_path: Path) -> None:
    """Qwen3-VL-4B has 4,437,815,808 parameters by its own account."""
    text = {
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "head_dim": 128,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    }
    vision = {
        "depth": 24,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "out_hidden_size": 2560,
        "patch_size": 16,
        "num_position_embeddings": 2304,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "deepstack_visual_indexes": [5, 11, 17],
    }
    (tmp_path / "config.json").write_text(json.dumps({"text_config": text, "vision_config": vision}))
    assert find_sizes(ModelConfig(str(tmp_path))).parameters == 4_437_815_808


@pytest.mark.parametrize("content", ["{", "[]", '{"text_config": {"d_model": 64}}'])
def test_of_an_unknown_or_corrupt_config_nothing_is_known(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    found = find_sizes(ModelConfig(str(tmp_path)))
    assert (found.parameters, found.text) == (None, None)


def test_a_name_says_how_many(monkeypatch: pytest.MonkeyPatch, run_config: Callable[..., Any]) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = find_sizes(run_config("model=qwen3vl", "model.name=nobody/has-this-7B").model)
    assert (found.parameters, found.text, found.image_pixels) == (7_000_000_000, None, QWEN3_VL_PIXELS)
