"""Adapters: only they are trainable, and engines get the model with the adapters merged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from support.helpers import TINY, Sampled, image, plain_logprobs, sample
from vlmrl.config.model import LoraConfig, ModelConfig, Part, VLMConfig
from vlmrl.errors import ConfigError
from vlmrl.models.lora import add_adapters, merged, select_trainable, without_adapters
from vlmrl.models.parts import part_of_each

SAMPLE = sample("a", [1, 2], image(2, 3), Sampled([4, 5, 6]))


@pytest.fixture
def adapted(tiny_model: Callable[[], Any]) -> Any:
    """A model whose adapters no longer have their initial values."""
    pytest.importorskip("peft")
    model = tiny_model()
    add_adapters(model, LoraConfig(rank=3, alpha=5.0))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_only_adapters_are_trainable_and_they_start_without_effect(tiny_model: Callable[[], Any]) -> None:
    pytest.importorskip("peft")
    model = tiny_model()
    add_adapters(model, LoraConfig(rank=3, targets=["q_proj", "down_proj"]))
    learning = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    layers = model.config.text_config.num_hidden_layers
    assert len(learning) == layers * 2 * 2
    assert all("language_model.layers" in name and 3 in shape for name, shape in learning.items())
    assert torch.equal(plain_logprobs(model, SAMPLE), plain_logprobs(tiny_model(), SAMPLE))


def test_merged_weights_are_the_adapted_model_by_the_names_of_the_checkpoint(
    adapted: Any, tiny_model: Callable[[], Any]
) -> None:
    plain = tiny_model()
    before = plain_logprobs(plain, SAMPLE)
    weights = dict(merged(adapted))
    parameters = dict(plain.named_parameters())
    assert weights.keys() == parameters.keys()
    changed = {name for name, p in parameters.items() if not torch.equal(weights[name], p)}
    assert len(changed) == 7 * plain.config.text_config.num_hidden_layers
    with torch.no_grad():
        for name, parameter in parameters.items():
            assert weights[name].dtype is parameter.dtype
            parameter.copy_(weights[name])
    wanted = plain_logprobs(adapted, SAMPLE)
    torch.testing.assert_close(plain_logprobs(plain, SAMPLE), wanted, rtol=1e-5, atol=1e-5)
    assert float((wanted - before).detach().abs().max()) > 0.1


def test_a_model_without_adapters_is_merged_as_it_is(tiny_model: Callable[[], Any]) -> None:
    model = tiny_model()
    for (name, tensor), (other, parameter) in zip(merged(model), model.named_parameters(), strict=True):
        assert name == other
        assert tensor is parameter


ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
DELTA_NET = {"in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("gemma3", ATTENTION | MLP),
        ("glm4v", ATTENTION | {"gate_up_proj", "down_proj"}),
        ("lfm2_vl", {"q_proj", "k_proj", "v_proj", "out_proj", "in_proj", "w1", "w2", "w3"}),
        ("qwen3_5_moe", ATTENTION | DELTA_NET | MLP | {"shared_expert_gate"}),
        ("qwen3_vl_moe", ATTENTION),
    ],
)
def test_every_linear_layer_of_the_language_model_by_default(
    family_folder: Callable[[str], Path], family: str, names: set[str]
) -> None:
    """Whatever a family calls them. The vision tower and the experts get none."""
    pytest.importorskip("peft")
    auto: Any = AutoModelForImageTextToText
    model = auto.from_pretrained(family_folder(family))
    language_model = model.base_model.get_decoder()
    linear = {id(module) for module in language_model.modules() if isinstance(module, torch.nn.Linear)}
    add_adapters(model, LoraConfig(rank=3))
    adapted = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert {name.rpartition(".")[2] for name in adapted} == names
    assert {id(module.base_layer) for module in adapted.values()} == linear


EVERYWHERE = [Part.vision_tower, Part.projector, Part.language_model]


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma4", "glm4v", "idefics3"])
def test_vision_tower_and_projector_get_adapters(family_folder: Callable[[str], Path], family: str) -> None:
    """All of their linear layers and no other one. The features of images change with the adapters."""
    pytest.importorskip("peft")
    auto: Any = AutoModelForImageTextToText
    model = auto.from_pretrained(family_folder(family))
    part_of = part_of_each(model)
    for parts in ([Part.vision_tower], [Part.projector, Part.vision_tower]):
        model = auto.from_pretrained(family_folder(family))
        linear = {
            name
            for name, module in model.named_modules()
            if type(module) is torch.nn.Linear and part_of.get(f"{name}.weight") in parts
        }
        add_adapters(model, LoraConfig(rank=3, parts=parts))
        assert {name for name, module in model.named_modules() if hasattr(module, "lora_A")} == linear
        assert {part_of_each(model)[name] for name, p in model.named_parameters() if p.requires_grad} == set(parts)


def test_merged_adapters_of_every_part(tiny_model: Callable[[], Any]) -> None:
    pytest.importorskip("peft")
    model, plain = tiny_model(), tiny_model()
    add_adapters(model, LoraConfig(rank=3, parts=EVERYWHERE))
    before = plain_logprobs(model, SAMPLE)
    torch.testing.assert_close(before, plain_logprobs(plain, SAMPLE))
    for name, parameter in model.named_parameters():
        if "lora_B" in name and "visual" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    wanted = plain_logprobs(model, SAMPLE)
    assert float((wanted - before).detach().abs().max()) > 0.01
    with torch.no_grad():
        for name, tensor in merged(model):
            plain.get_parameter(name).copy_(tensor)
    torch.testing.assert_close(plain_logprobs(plain, SAMPLE), wanted, rtol=1e-4, atol=1e-5)
    with without_adapters(model):
        torch.testing.assert_close(plain_logprobs(model, SAMPLE), before)


def test_names_that_no_layer_has(tiny_model: Callable[[], Any]) -> None:
    pytest.importorskip("peft")
    with pytest.raises(ConfigError, match=r"model\.lora\.targets=\['qkv'\] names no linear layer"):
        add_adapters(tiny_model(), LoraConfig(targets=["qkv"]))  # the vision tower has one
    add_adapters(tiny_model(), LoraConfig(targets=["qkv"], parts=[Part.vision_tower]))


@pytest.mark.parametrize(("vision", "language"), [(True, False), (False, True), (False, False)])
def test_parts_are_frozen(tiny_model: Callable[[], Any], vision: bool, language: bool) -> None:
    model = tiny_model()
    assert TINY.vlm is not None
    family: dict[str, Any] = {k: v for k, v in vars(TINY.vlm).items() if not k.startswith("freeze")}
    vlm = VLMConfig(**family, freeze_vision=vision, freeze_language=language)
    select_trainable(model, ModelConfig(name="tiny", vlm=vlm))
    plain_logprobs(model, SAMPLE).sum().backward()  # type: ignore[no-untyped-call]
    for name, parameter in model.named_parameters():
        is_frozen = vision if ".visual." in name else language
        assert parameter.requires_grad is not is_frozen
        assert is_frozen or parameter.grad is not None, name
