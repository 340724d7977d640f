"""Which parameters are trainable: everything, one tower, or LoRA adapters only.

LoRA (arXiv 2106.09685) by PEFT computes W x + (alpha / rank) B A x, with trainable A and B and a frozen W. Engines get
W + (alpha / rank) B A in place of each W, under W's name (`merged`), so neither they nor weight sync know of adapters.
Left out on purpose: adapters that an engine loads as adapters, dropout.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from vlmrl.config.model import EVERY_LINEAR_LAYER, LoraConfig, ModelConfig
from vlmrl.errors import ConfigError
from vlmrl.models.image_encoder import image_parameters

ADAPTER = "default"
"""PEFT's name of the one adapter."""


def select_trainable(model: Any, config: ModelConfig) -> None:
    """Add adapters, or freeze what `model.vlm.freeze_*` says, in place. Raises `ConfigError` where adapters have no
    layer to be added to."""
    if config.lora is not None:
        add_adapters(model, config.lora)
    elif config.vlm is not None and (config.vlm.freeze_vision or config.vlm.freeze_language):
        if config.vlm.freeze_language:
            model.requires_grad_(False)
        for parameter in image_parameters(model):
            parameter.requires_grad_(not config.vlm.freeze_vision)


def add_adapters(model: Any, config: LoraConfig) -> None:
    """Add adapters to the linear layers of the language model that `config` names; only adapters are trainable then.

    B starts at 0, so the model's outputs do not change at first. Raises `ConfigError` where no layer has such a name.
    """
    import peft

    language_model = model.base_model.get_decoder()
    prefix = next(name for name, module in model.named_modules() if module is language_model)
    targets = [
        name
        for name, module in model.named_modules()
        if name.startswith(f"{prefix}.")
        and (EVERY_LINEAR_LAYER in config.targets or name.rpartition(".")[2] in config.targets)
        and type(module) is torch.nn.Linear  # a subclass may return something else (the router of Llama 4)
    ]
    if not targets:
        raise ConfigError(
            f"model.lora.targets={list(config.targets)} names no linear layer of {type(model).__name__}'s language "
            "model, so there would be nothing to train: name layers that it has, e.g. [q_proj, v_proj]"
        )
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=targets,
        lora_dropout=0.0,
    )
    peft.inject_adapter_in_model(settings, model, adapter_name=ADAPTER)


@contextlib.contextmanager
def without_adapters(model: Any) -> Iterator[None]:
    """Inside the block, the model computes what it computes without its adapters: their factor is 0."""
    layers = [module for module in model.modules() if ADAPTER in getattr(module, "lora_A", ())]
    factors = [layer.scaling[ADAPTER] for layer in layers]
    try:
        for layer in layers:
            layer.scaling[ADAPTER] = 0.0
        yield
    finally:
        for layer, factor in zip(layers, factors, strict=True):
            layer.scaling[ADAPTER] = factor


def merged(model: Any, whole: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the model's tensors by their names in a checkpoint, with adapters merged. A tied head is not repeated.

    A tensor without an adapter is yielded itself, not a copy. `whole` gathers a tensor of which this rank holds a
    slice; then every rank must consume the whole iterator.
    """
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        path, base, leaf = name.rpartition(".base_layer.")
        if ".lora_A." in name or ".lora_B." in name:
            continue
        if not base:
            yield name, whole(parameter)
            continue
        layer: Any = modules[path]
        tensor = whole(parameter)
        if leaf == "weight":
            a, b = (whole(matrices[ADAPTER].weight).float() for matrices in (layer.lora_A, layer.lora_B))
            with torch.no_grad():
                tensor = (tensor.float() + layer.scaling[ADAPTER] * (b @ a)).to(tensor.dtype)
        yield f"{path}.{leaf}", tensor
