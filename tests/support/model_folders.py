"""Configs of models in folders, and a hub that cannot be reached."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlmrl.config.model import Dtype, ModelConfig, VLMConfig

QWEN3_VL = VLMConfig(family="qwen3_vl", renderers=["qwen3-vl"], positions="mrope", image_token="<|image_pad|>")


def folder_config(folder: Path, dtype: Dtype = Dtype.float32, device: str = "cpu") -> ModelConfig:
    """The config of a checkpoint in a folder."""
    return ModelConfig(name=str(folder), dtype=dtype, device=device, vlm=QWEN3_VL)


def without_hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the hub unreachable and its cache empty. Returns the cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return cache
