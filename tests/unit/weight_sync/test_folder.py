"""The folder of `weight_sync=folder`; tests/unit/inference/vllm/test_engine.py publishes through it to real servers."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from vlmrl.config.inference import VllmConfig
from vlmrl.config.model import Dtype
from vlmrl.config.weight_sync import FolderSyncConfig
from vlmrl.errors import ConfigError
from vlmrl.inference.vllm.engine import VllmEngine
from vlmrl.weight_sync.folder import FolderSync


def engine() -> VllmEngine:
    config = VllmConfig(dtype=Dtype.float32, urls=["http://127.0.0.1:1"])
    return VllmEngine(config, Path("ckpt"), Path("logs"), lambda line: None, lambda line: None)


def weights() -> dict[str, Any]:
    return {"w": torch.zeros(2)}


def test_a_root_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"weight_sync\.root=.*/nowhere is not a folder that .*: set weight_sync\.root"
    ):
        FolderSync(engine(), weights, FolderSyncConfig(root=str(tmp_path / "nowhere")))


def test_the_folder_is_removed_with_the_sync(tmp_path: Path) -> None:
    sync = FolderSync(engine(), weights, FolderSyncConfig(root=str(tmp_path)))
    assert sync.folder.parent == tmp_path
    sync.close()
    sync.close()
    assert list(tmp_path.iterdir()) == []
    FolderSync(engine(), weights, FolderSyncConfig(root=str(tmp_path)))
    gc.collect()  # engine and sync refer to each other
    assert list(tmp_path.iterdir()) == []
