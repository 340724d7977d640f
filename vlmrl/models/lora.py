"""Which parameters are trainable: everything, one tower, or LoRA adapters only.

LoRA (arXiv 2106.09685) by PEFT computes W x + (alpha / rank) B A x, with trainable A and B and a frozen W. Engines get
W + (alpha / rank) B A in place of each W, under W's name (`merged`), so neither they nor weight sync know of adapters.
W may be held in 4 bits (nf4.py).
Left out on purpose: adapters that an engine loads as adapters, dropout.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from vlmrl.config.model import EVERY_LINEAR_LAYER, BaseDtype, LoraConfig, ModelConfig
from vlmrl.errors import ConfigError
from vlmrl.models.nf4 import Nf4Linear, fits
from vlmrl.models.parts import part_of_each
from vlmrl.models.value_head import is_of_value_head
from vlmrl.models.vision_encoder import image_parameters

ADAPTER = "default"
"""PEFT's name of the one adapter."""


def select_trainable(model: Any, config: ModelConfig, device: torch.device | None = None) -> None:
    """Add adapters, or freeze what `model.vlm.freeze_*` says, in place. Layers that are held in 4 bits go to `device`
    one after the other, by default where they are. Raises `ConfigError` where adapters have no layer to be added to."""
    if config.lora is not None:
        add_adapters(model, config.lora)
        if is_quantized(config):
            quantize(model, device)
    elif config.vlm is not None and (config.vlm.freeze_vision or config.vlm.freeze_language):
        if config.vlm.freeze_language:
            model.requires_grad_(False)
        for parameter in image_parameters(model):
            parameter.requires_grad_(not config.vlm.freeze_vision)


def is_quantized(config: ModelConfig) -> bool:
    """Whether frozen layers are held in 4 bits."""
    return config.lora is not None and config.lora.base_dtype is BaseDtype.nf4


def add_adapters(model: Any, config: LoraConfig) -> None:
    """Add adapters to the linear layers that `config` names; only adapters are trainable then.

    B starts at 0, so the model's outputs do not change at first. Raises `ConfigError` where no layer has such a name.
    """
    import peft

    part_of = part_of_each(model)
    targets = []
    for part in config.parts:
        found = [
            name
            for name, module in model.named_modules()
            if type(module) is torch.nn.Linear  # a subclass may return something else (the router of Llama 4)
            and part_of.get(f"{name}.weight") is part
            and (EVERY_LINEAR_LAYER in config.targets or name.rpartition(".")[2] in config.targets)
        ]
        if not found:
            raise ConfigError(
                f"model.lora.targets={list(config.targets)} names no linear layer of {type(model).__name__}'s "
                f"{part.value.replace('_', ' ')}, so there would be nothing to train: name layers that it has, e.g. "
                f"[q_proj, v_proj], or drop {part.value} from model.lora.parts"
            )
        targets += found
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=targets,
        lora_dropout=0.0,
    )
    peft.inject_adapter_in_model(settings, model, adapter_name=ADAPTER)


def quantize(model: Any, device: torch.device | None = None) -> None:
    """Hold every frozen linear layer of the language model in 4 bits, on `device`, by default where it is. The head is
    none of them, as its rows are also the embedding's in many models."""
    for module in list(model.base_model.get_decoder().modules()):
        for name, layer in list(module.named_children()):
            if fits(layer) and not layer.weight.requires_grad:
                setattr(module, name, Nf4Linear(layer, device))


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
    """Yield the model's tensors by their names in a checkpoint, with adapters merged, and weights of 4 bits in the
    dtype that their layer computes in. A tied head is not repeated, and a value head, which the trainer alone has, is
    left out.

    A tensor without an adapter is yielded itself, not a copy. `whole` gathers a tensor of which this rank holds a
    slice; then every rank must consume the whole iterator.
    """
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        path, base, leaf = name.rpartition(".base_layer.")
        if ".lora_A." in name or ".lora_B." in name or is_of_value_head(name):
            continue
        if not base:
            yield name, whole(parameter)
        else:
            tensor = whole(parameter)
            yield f"{path}.{leaf}", _with_adapter(tensor, modules[path], whole) if leaf == "weight" else tensor
    for name, module in modules.items():
        if isinstance(module, Nf4Linear):
            path, base, _ = f"{name}.".rpartition(".base_layer.")
            if base:
                yield f"{path}.weight", _with_adapter(module.weight, modules[path], whole)
            else:
                yield f"{name}.weight", module.weight


def _with_adapter(weight: Tensor, layer: Any, whole: Callable[[Tensor], Tensor]) -> Tensor:
    a, b = (whole(matrices[ADAPTER].weight).float() for matrices in (layer.lora_A, layer.lora_B))
    with torch.no_grad():
        tensor: Tensor = (weight.float() + layer.scaling[ADAPTER] * (b @ a)).to(weight.dtype)
        return tensor
