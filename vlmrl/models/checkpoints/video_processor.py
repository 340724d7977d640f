"""Loads a checkpoint's video processor, which transformers has for torchvision only."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vlmrl.config.model import VideoConfig
from vlmrl.errors import ModelError, headline
from vlmrl.models.checkpoints.image_size import resized_video


def load_video_processor(folder: Path, config: VideoConfig) -> Any:
    """The video processor of `folder`, with the sizes that `config` sets. Raises `ModelError` where it does not load,
    and `ConfigError` for sizes that it does not have."""
    missing = [name for name in ("torchvision",) if find_spec(name) is None]
    if missing:
        raise ModelError(
            f"transformers makes videos with {missing[0]}, which is not installed, so no video could be processed: "
            "pip install 'vlmrl[video]'"
        )
    from transformers import AutoVideoProcessor

    auto: Any = AutoVideoProcessor
    try:
        processor = auto.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # code of any family, over files that may hold anything
        raise ModelError(
            f"the video processor of {folder} does not load ({headline(error).partition('. ')[0]}): use the "
            "video_preprocessor_config.json that belongs to the checkpoint"
        ) from error
    return resized_video(processor, config)
