"""The GPUs of this machine allow `weight_sync=nccl` and `weight_sync=cuda_ipc`."""

from __future__ import annotations

from vlmrl.config.inference import VllmConfig
from vlmrl.config.run import Mode, RunConfig
from vlmrl.config.weight_sync import WeightSyncConfig
from vlmrl.errors import ConfigError
from vlmrl.preflight.site import Site


def gpus_can_transfer(config: RunConfig, site: Site) -> None:
    """The trainer has a GPU to send from, and the servers are on the GPUs that the transfer needs."""
    if config.mode is Mode.export or site.serves or not isinstance(config.inference, VllmConfig):
        return
    refuse_transfer(config.weight_sync, config.inference, config.model.device)


def refuse_transfer(sync: WeightSyncConfig, inference: VllmConfig, device: str) -> None:
    """Raise `ConfigError` where this machine's GPUs do not allow `sync`. `device` is `model.device`."""
    if sync.kind not in ("nccl", "cuda_ipc"):
        return
    import torch

    from vlmrl.inference.vllm.server import visible_devices

    if not torch.cuda.is_available():
        raise ConfigError(
            f"weight_sync={sync.kind} sends weights from a GPU, and torch finds none here, so no policy version would "
            "reach the servers: set weight_sync=folder"
        )
    if inference.starts_servers:
        devices = visible_devices()
        trainer = torch.device("cuda" if device == "auto" else device).index or 0
        refuse_places(sync, inference, devices[trainer], devices)


def refuse_places(sync: WeightSyncConfig, inference: VllmConfig, trainer: str, devices: list[str]) -> None:
    """Raise `ConfigError` where the servers, spread over `devices`, are on the wrong side of the GPU `trainer`.

    >>> from vlmrl.config.weight_sync import CudaIpcSyncConfig
    >>> refuse_places(CudaIpcSyncConfig(), VllmConfig(), "0", ["0"])
    """
    from vlmrl.inference.vllm.server import replica_devices

    taken = {gpu for replica in range(inference.replicas) for gpu in replica_devices(replica, inference, devices)}
    if sync.kind == "cuda_ipc" and taken != {trainer}:
        raise ConfigError(
            f"weight_sync=cuda_ipc works only where every server is on the trainer's GPU {trainer}, because a server "
            f"on another GPU cannot open the trainer's memory, and the servers are on {','.join(sorted(taken))}: set "
            f"weight_sync=nccl, or CUDA_VISIBLE_DEVICES={trainer} with inference.tensor_parallel_size=1 "
            "inference.data_parallel_size=1"
        )
    if sync.kind == "nccl" and trainer in taken:
        raise ConfigError(
            f"weight_sync=nccl works only where the servers are on other GPUs than the trainer's {trainer}, because "
            f"NCCL refuses two ranks on one GPU: set weight_sync={'cuda_ipc' if len(devices) == 1 else 'folder'}, or "
            f"fewer inference.replicas than the {len(devices)} visible GPUs hold next to the trainer"
        )
