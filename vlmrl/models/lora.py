"""Low-rank adapters (LoRA, arXiv 2106.09685) by PEFT: W x + (alpha / rank) B A x, where A and B learn and W does not.

Engines get W + (alpha / rank) B A in place of each W, under W's name (`merged`): they need not know of adapters, and
every way to bring them weights stays as it is. Left out on purpose: adapters that an engine loads as such, dropout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from vlmrl.config.model import LoraConfig
from vlmrl.errors import ConfigError

ADAPTER = "default"


def add_adapters(model: Any, config: LoraConfig) -> None:
    """Put adapters beside the linear layers of the language model that `config` names; nothing else learns then.

    B begins at 0, so the model computes what it did. Raises `ConfigError` where no layer has such a name.
    """
    import peft

    language_model = model.base_model.get_decoder()
    prefix = next(name for name, module in model.named_modules() if module is language_model)
    targets = [
        name
        for name, module in model.named_modules()
        if name.startswith(f"{prefix}.")
        and name.rpartition(".")[2] in config.targets
        and isinstance(module, torch.nn.Linear)
    ]
    if not targets:
        raise ConfigError(
            f"model.lora.targets={list(config.targets)} requires linear layers of these names, else nothing learns: "
            f"{type(model).__name__} has none in its language model"
        )
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=targets,
        lora_dropout=0.0,
    )
    peft.inject_adapter_in_model(settings, model, adapter_name=ADAPTER)


def merged(model: Any, whole: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors by their names in a checkpoint, adapters merged; one after the other, and each once: a head
    that is the embedding is not a second one. A tensor without an adapter is itself, not a copy.

    `whole` makes a tensor whole of which this rank holds a slice; every rank must come to the end then.
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
