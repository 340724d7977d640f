"""Digests and slices; against a real engine in tests/unit/inference/vllm/test_engine.py."""

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
from vlmrl.models.digests import assemble, digest
from vlmrl.weight_sync.folder import FolderSync
from vlmrl.weight_sync.servers import without_ties


def test_a_digest_is_of_values() -> None:
    values = torch.tensor([[1.5, -0.0], [2.0, 3.0]])
    assert digest(values) == digest(values.to(torch.bfloat16))
    assert digest(values) == digest(torch.tensor([[1.5, 0.0], [2.0, 3.0]]))
    assert digest(values) == digest(values.t().contiguous().t())
    assert digest(values) != digest(values.t())
    assert digest(values) != digest(values + 2**-20)


def test_assembled_shards_are_the_fused_matrix() -> None:
    """q and k of two ranks: each rank's q rows, then its k rows."""
    q, k = torch.arange(8.0).view(4, 2), torch.arange(20.0, 24.0).view(2, 2)
    tensors = {"q": q, "k": k}
    ranks = [assemble([("q", 0, 2 * rank, 2 * rank + 2), ("k", 0, rank, rank + 1)], tensors) for rank in (0, 1)]
    assert torch.equal(ranks[1], torch.tensor([[4.0, 5.0], [6.0, 7.0], [22.0, 23.0]]))
    assert torch.equal(assemble([("q", 1, 1, 2)], tensors), q[:, 1:])
    assert assemble([("q", -1, 0, 0)], tensors) is q


def test_tied_tensors_are_sent_once_and_equal_ones_each() -> None:
    weight = torch.zeros(4, 2)
    tensors = {"embed": weight, "head": weight, "other": torch.zeros(4, 2), "view": weight[:2]}
    assert list(without_ties(tensors)) == ["embed", "other", "view"]


def engine() -> VllmEngine:
    config = VllmConfig(dtype=Dtype.float32, urls=["http://127.0.0.1:1"])
    return VllmEngine(config, Path("ckpt"), Path("logs"), [], lambda line: None, lambda line: None)


def weights() -> dict[str, Any]:
    return {"w": torch.zeros(2)}


def test_a_root_that_takes_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"weight_sync\.root=.*/nowhere is not a folder that .*: set weight_sync\.root"
    ):
        FolderSync(engine(), weights, FolderSyncConfig(root=str(tmp_path / "nowhere")))


def test_the_folder_goes_with_the_sync(tmp_path: Path) -> None:
    sync = FolderSync(engine(), weights, FolderSyncConfig(root=str(tmp_path)))
    assert sync.folder.parent == tmp_path
    sync.close()
    sync.close()
    assert list(tmp_path.iterdir()) == []
    FolderSync(engine(), weights, FolderSyncConfig(root=str(tmp_path)))
    gc.collect()  # engine and sync know each other
    assert list(tmp_path.iterdir()) == []
