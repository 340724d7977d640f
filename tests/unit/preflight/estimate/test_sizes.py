"""The model's numbers against the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from support import helpers
from vlmrl.config.model import ModelConfig
from vlmrl.models.families.base import ImageBounds
from vlmrl.preflight.estimate.sizes import find_sizes

TINY_PIXELS = ImageBounds(32 * 32, 1024 * 1024)
QWEN3_VL_PIXELS = ImageBounds(256 * 256, 4096 * 4096)


def test_the_parameters_of_the_tiny_model_are_counted_exactly(tiny_model: Callable[[], Any], tiny_folder: Path) -> None:
    model = tiny_model()
    found = find_sizes(replace(helpers.TINY, name=str(tiny_folder), tiny=None))
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.vision_parameters == sum(p.numel() for p in model.base_model.visual.parameters())
    assert found.text is not None
    assert found.text.vocabulary == model.get_input_embeddings().num_embeddings
    assert found.image_bounds == TINY_PIXELS
    assert found.source == f"the weights in {tiny_folder}"


def test_before_it_is_built_they_are_those_of_the_config(run_config: Callable[..., Any]) -> None:
    found = find_sizes(run_config().model)
    assert (found.parameters, found.source) == (428_480, "model.tiny")


@pytest.mark.parametrize(("size", "parameters"), [("2b", 2_127_532_032), ("4b", 4_437_815_808), ("8b", 8_767_123_696)])
def test_a_released_checkpoint_by_its_size(size: str, parameters: int, run_config: Callable[..., Any]) -> None:
    """The hub says 2.13, 4.44 and 8.77 billion."""
    assert find_sizes(run_config("model=qwen3vl", f"model/size={size}").model).parameters == parameters


def test_a_mixture_of_experts(run_config: Callable[..., Any]) -> None:
    found = find_sizes(run_config("model=qwen3vl_moe").model)
    assert found.parameters == 31_070_754_032
    assert found.text is not None
    assert found.text.intermediate == 8 * 768, "eight of 128 experts work on a token"


@pytest.mark.parametrize(("group", "family"), [("qwen3vl", "qwen3_vl"), ("qwen3vl_moe", "qwen3_vl_moe")])
def test_the_parameters_of_an_architecture_are_counted_exactly(
    group: str, family: str, run_config: Callable[..., Any]
) -> None:
    """On the meta device: no weights."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = run_config(f"model={group}", "model.init=random").model
    architecture = AutoConfig.for_model(
        family,
        text_config=dict(config.size.text),
        vision_config=dict(config.size.vision),
        tie_word_embeddings=config.size.tie_word_embeddings,
    )
    auto: Any = AutoModelForImageTextToText
    with torch.device("meta"):
        model = auto.from_config(architecture)
    assert find_sizes(config).parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("content", ["{", "[]", '{"text_config": {"d_model": 64}}'])
def test_of_an_unknown_or_corrupt_config_nothing_is_known(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    found = find_sizes(ModelConfig(name=str(tmp_path)))
    assert (found.parameters, found.text) == (None, None)


def test_a_name_says_how_many(monkeypatch: pytest.MonkeyPatch, run_config: Callable[..., Any]) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = find_sizes(run_config("model=qwen3vl", "model.name=nobody/has-this-7B").model)
    assert (found.parameters, found.text, found.image_bounds) == (7_000_000_000, None, QWEN3_VL_PIXELS)
