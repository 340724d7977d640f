"""`model.init=random`: the true architecture of `model.size` with random weights, and nothing downloaded.

    ensure_architecture   a folder with config.json, tokenizer, chat template and image processor, and no weights
    initialize            the model, made in its format on its device: no copy of it passes through the host
    write_weights         the same folder with weights, for vLLM's servers

Token ids are those of a small tokenizer trained on the task's words; the vocabulary is the size's own, and what the
tokenizer does not know is never sampled. Left out on purpose: MoE's load-balancing loss.
"""

from __future__ import annotations

import shutil
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmrl.config.model import ModelConfig
from vlmrl.models.cache import MANIFEST, built
from vlmrl.models.checkpoints.text_files import MAX_PIXELS, special_ids, write_text_files
from vlmrl.models.lora import merged

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

BUILDER_VERSION = 1
"""Raise it when this file writes other bytes for the same config and texts: old caches are then not found."""

BPE_MERGES = 128


def ensure_architecture(config: ModelConfig, texts: tuple[str, ...]) -> Path:
    """The folder of `config.size`, without weights, from the cache or built. `texts` are what the tokenizer knows."""
    assert config.size is not None, "random_has_size checks it"
    assert config.vlm is not None, "random_has_size checks it"
    size = config.size

    def build(folder: Path) -> None:
        from transformers import AutoConfig

        length = int(size.text["max_position_embeddings"])
        ids = special_ids(write_text_files(folder, texts, BPE_MERGES, length, MAX_PIXELS))
        assert config.vlm is not None
        AutoConfig.for_model(
            config.vlm.family,
            text_config={
                **size.text,
                "tie_word_embeddings": size.tie_word_embeddings,
                "bos_token_id": ids["<|endoftext|>"],
                "eos_token_id": ids["<|im_end|>"],
            },
            vision_config=dict(size.vision),
            image_token_id=ids["<|image_pad|>"],
            video_token_id=ids["<|video_pad|>"],
            vision_start_token_id=ids["<|vision_start|>"],
            vision_end_token_id=ids["<|vision_end|>"],
            tie_word_embeddings=size.tie_word_embeddings,
            dtype=config.dtype.value,
        ).save_pretrained(folder)

    key: list[Any] = [BUILDER_VERSION, config.vlm.family, config.dtype.value, list(texts)]
    key += [
        dict(size.text),
        dict(size.vision),
        size.tie_word_embeddings,
        version("transformers"),
        version("tokenizers"),
    ]
    return built("random", key, build)


def initialize(folder: Path, config: ModelConfig, device: torch.device) -> PreTrainedModel:
    """The model of `folder`'s config.json, of `config.dtype` on `device`, in eval mode; random by torch's own state."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    auto: Any = AutoModelForImageTextToText
    with device:
        model: PreTrainedModel = auto.from_config(
            AutoConfig.from_pretrained(folder, local_files_only=True), dtype=getattr(torch, config.dtype.value)
        ).eval()
    return model


def write_weights(model: PreTrainedModel, folder: Path, target: Path) -> Path:
    """A checkpoint in `target`: what is in `folder`, and the weights of `model` → `target`."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # it would draw over the live view
    shutil.copytree(folder, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST))
    model.save_pretrained(target, state_dict=dict(merged(model)))
    return target
