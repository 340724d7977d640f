"""GPUs on which weights can, or cannot, go from the trainer's GPU to the servers'."""

from __future__ import annotations

import pytest
import torch

from vlmrl.config.inference import VllmConfig
from vlmrl.config.weight_sync import CudaIpcSyncConfig, NcclSyncConfig, WeightSyncConfig
from vlmrl.errors import ConfigError
from vlmrl.preflight.rules.transfer import refuse_places, refuse_transfer


@pytest.mark.parametrize(
    ("sync", "replicas", "devices", "message"),
    [
        (NcclSyncConfig(), 1, ["0", "1"], None),
        (NcclSyncConfig(), 1, ["0"], "weight_sync=nccl works only .* on other GPUs .* set weight_sync=cuda_ipc"),
        (NcclSyncConfig(), 2, ["3", "5"], "than the trainer's 3.*weight_sync=folder"),
        (CudaIpcSyncConfig(), 1, ["0"], None),
        (CudaIpcSyncConfig(), 1, ["0", "1"], "every server is on the trainer's GPU 0.*servers are on 1.*nccl"),
    ],
)
def test_servers_must_be_on_the_gpus_that_the_transfer_needs(
    sync: WeightSyncConfig, replicas: int, devices: list[str], message: str | None
) -> None:
    config = VllmConfig(replicas=replicas)
    if message is None:
        refuse_places(sync, config, devices[0], devices)
        return
    with pytest.raises(ConfigError, match=message):
        refuse_places(sync, config, devices[0], devices)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_can_be_sent() -> None:
    with pytest.raises(ConfigError, match="weight_sync=nccl sends weights from a GPU, and torch finds none here"):
        refuse_transfer(NcclSyncConfig(), VllmConfig(), "auto")
