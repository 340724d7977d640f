"""`model.init=random`: the real architecture of `model.size` with random weights. Nothing is downloaded.

    ensure_architecture   a folder with config.json, tokenizer, chat template and image processor, without weights
    initialize            the model, made in its dtype on its device: no copy of it passes through the host
    write_weights         the same folder with weights, for vLLM's servers

Token ids are those of a small tokenizer trained on the task's words. The vocabulary is the size's own; ids that the
tokenizer does not know are never sampled. Left out on purpose: the load-balancing loss of mixtures of experts.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmrl.config.model import ModelConfig
from vlmrl.models.checkpoints.built_folders import MANIFEST, built
from vlmrl.models.checkpoints.published import keep_published_layout
from vlmrl.models.checkpoints.text_files import config_token_ids, write_text_files
from vlmrl.models.families import family_of
from vlmrl.models.lora import merged

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

BUILDER_VERSION = 2
"""Raise it when this file writes other bytes for the same config and texts: old caches are then not found."""

BPE_MERGES = 128


def ensure_architecture(config: ModelConfig, texts: tuple[str, ...]) -> Path:
    """The folder of `config.size`, without weights, from the cache or built. The tokenizer is trained on `texts`."""
    size, family = config.size, family_of(config.vlm)
    recipe = family.recipe
    assert size is not None, "preflight refuses model.init=random without model.size"
    assert recipe is not None, f"preflight refuses model.init=random for family {family.name}"

    def build(folder: Path) -> None:
        from transformers import AutoConfig

        length = int(size.text["max_position_embeddings"])
        text_ids, ids = config_token_ids(
            recipe, write_text_files(folder, recipe, texts, BPE_MERGES, length, recipe.made_here)
        )
        AutoConfig.for_model(
            family.name,
            text_config={**size.text, "tie_word_embeddings": size.tie_word_embeddings, **text_ids},
            vision_config=dict(size.vision),
            **ids,
            tie_word_embeddings=size.tie_word_embeddings,
            dtype=config.dtype.value,
        ).save_pretrained(folder)

    key: list[Any] = [BUILDER_VERSION, asdict(recipe), family.name, config.dtype.value, list(texts)]
    key += [
        dict(size.text),
        dict(size.vision),
        size.tie_word_embeddings,
        version("transformers"),
        version("tokenizers"),
    ]
    return built("random", key, build)


def initialize(folder: Path, config: ModelConfig, device: torch.device) -> PreTrainedModel:
    """The model of `folder`'s config.json, in `config.dtype` on `device`, in eval mode; random by torch's own state."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    auto: Any = AutoModelForImageTextToText
    with device:
        model: PreTrainedModel = auto.from_config(
            AutoConfig.from_pretrained(folder, local_files_only=True), dtype=getattr(torch, config.dtype.value)
        ).eval()
    keep_published_layout(model)
    return model


def write_weights(model: PreTrainedModel, folder: Path, target: Path) -> Path:
    """Write a checkpoint to `target`: the files of `folder` and the weights of `model`. Returns `target`."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # it would draw over the live view
    shutil.copytree(folder, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST))
    model.save_pretrained(target, state_dict=dict(merged(model)))
    return target
