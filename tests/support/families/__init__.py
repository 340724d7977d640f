"""Tiny checkpoints of model families, as complete Hugging Face folders: real classes, random weights.

    build("gemma3", folder)      config.json, model.safetensors, tokenizer, chat template, processor, generation_config

Each family has its own tokenizer with its own vocabulary, the special tokens of the real family under their own
spelling, the family's chat template and the settings of its image processor. `Recipe.template_source` says where the
template came from.

Left out on purpose: settings of video processors, because no video is on the path.
"""

from __future__ import annotations

from support.families.gemma import GEMMAS
from support.families.glm import GLM4V
from support.families.llava import LLAVAS
from support.families.mistral import MISTRALS
from support.families.more import MORE
from support.families.qwen import QWENS
from support.families.recipe import Recipe, build
from support.families.text_only import TEXT_ONLY
from support.families.tiles import TILED
from support.families.unnamed import UNNAMED

FAMILIES: dict[str, Recipe] = {
    **QWENS,
    **GEMMAS,
    **TILED,
    **LLAVAS,
    "glm4v": GLM4V,
    **MISTRALS,
    **TEXT_ONLY,
    **UNNAMED,
    **MORE,
}
"""By name: the model type, but for pixtral (llava), llama3 (llama) and gemma4_vision (gemma4)."""

__all__ = ["FAMILIES", "Recipe", "build"]
