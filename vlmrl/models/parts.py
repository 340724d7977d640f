"""The parts of a model, found without naming a family: vision tower, projector, language model, head.

    images ─▶ vision tower ─▶ projector ─▶ language model (embedding, layers, norm) ─▶ head ─▶ logits

A family has its projector behind the tower (`multi_modal_projector`, `connector`, `aligner`), or inside it, where
transformers calls it a merger (Qwen-VL, GLM-V).
"""

from __future__ import annotations

from typing import Any

from torch import nn

from vlmrl.config.model import Part
from vlmrl.config.trainer import PartRatesConfig
from vlmrl.errors import ConfigError
from vlmrl.models.vision_encoder import image_parameters, image_tower

PROJECTOR_IN_TOWER = "merger"
"""In the names of the modules of a tower that lead from its layers to the language model."""


def part_of_each(model: Any) -> dict[str, Part]:
    """The part of every parameter, by its name. A head that is tied to the embedding is one tensor with it, and belongs
    to the language model."""
    of_images = {id(parameter) for parameter in image_parameters(model)}
    of_head = {id(parameter) for parameter in model.get_output_embeddings().parameters()}
    of_head -= {id(parameter) for parameter in model.get_input_embeddings().parameters()}
    of_tower = _tower_parameters(model)
    found = {}
    for name, parameter in model.named_parameters():
        if id(parameter) in of_images:
            found[name] = Part.vision_tower if id(parameter) in of_tower else Part.projector
        else:
            found[name] = Part.head if id(parameter) in of_head else Part.language_model
    return found


def assert_rates_reach(rates: PartRatesConfig, model: Any) -> None:
    """Raise `ConfigError` where a factor of `trainer.part_rates` is set for a part that has no trainable weights."""
    part_of = part_of_each(model)
    there = {part_of[name] for name, parameter in model.named_parameters() if parameter.requires_grad}
    for part in Part:
        factor = getattr(rates, part.value)
        if factor != 1 and part not in there:
            tied = " (a head that is tied to the embedding belongs to language_model)" if part is Part.head else ""
            raise ConfigError(
                f"trainer.part_rates.{part.value}={factor} has no effect, because this model has no trainable weights "
                f"of that part{tied}: set trainer.part_rates.{part.value}=1; parts that learn: "
                f"{', '.join(each.value for each in Part if each in there)}"
            )


def _tower_parameters(model: Any) -> set[int]:
    """The ids of the parameters of the vision tower, without a projector inside it."""
    tower = image_tower(model)
    if tower is None:
        return {id(parameter) for parameter in image_parameters(model)}
    projectors = [child for name, child in tower.named_children() if PROJECTOR_IN_TOWER in name]
    return _ids(tower) - {id for projector in projectors for id in _ids(projector)}


def _ids(module: nn.Module) -> set[int]:
    return {id(parameter) for parameter in module.parameters()}
