"""What `weight_sync=nccl` and `weight_sync=cuda_ipc` share: GPU to GPU, nothing touches a disk or the host's memory.

    publish ─▶ copy on the trainer's GPU (engine's dtype) ─▶ one server after the other, each by a `Sender` of its own

The copy stays until the next version. It is what a server gets that comes back in the middle of a training step, when
the trainer's own weights are in motion; to wait for the next publish instead would have rollouts wait for a whole step.
It costs 2 bytes a parameter in bfloat16, beside the trainer's 12 to 16 (weights, gradients, AdamW's two averages), and
a millisecond per few GB. And only memory that nobody writes to is lent to another process.

Servers take turns: they would share the one link out of the trainer's GPU anyway. Each life of a server has a sender of
its own, so one that dies takes no other's connection down; a broadcast that it leaves hanging is aborted.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from vlmrl.config.inference import VllmConfig
from vlmrl.config.weight_sync import WeightSyncConfig
from vlmrl.errors import ConfigError
from vlmrl.inference.vllm.client import VllmClient
from vlmrl.inference.vllm.engine import VllmEngine
from vlmrl.inference.vllm.server import WeightTransfer, replica_devices, visible_devices, vllm_version
from vlmrl.weight_sync.servers import ServerSync
from vlmrl.weight_sync.vllm_transfer import Remote, Sender

WEIGHT_TRANSFERS: dict[str, WeightTransfer] = {"nccl": "nccl", "cuda_ipc": "ipc"}
"""`weight_sync.kind` → vLLM's engine that a server must be started with."""


class GpuSync(ServerSync):
    """See the module."""

    def __init__(self, engine: VllmEngine, weights: Callable[[], Mapping[str, Tensor]], *, verify: bool) -> None:
        super().__init__(engine, weights, verify=verify)
        self._tensors: Mapping[str, Tensor] = {}
        self._senders: dict[VllmClient, Sender] = {}
        self._turn = asyncio.Lock()

    @abstractmethod
    def _open(self, remote: Remote, client: VllmClient, tensors: Mapping[str, Tensor]) -> Sender:
        """Connect to a server that is new. Runs in a thread, on the GPU of `tensors`."""

    def close(self) -> None:
        """Leave the servers."""
        for sender in self._senders.values():
            sender.close()
        self._senders.clear()
        self._tensors = {}

    def _gather_and_stage(self, version: int) -> Mapping[str, Tensor]:
        self._tensors = {}  # before the new ones are made: two copies need not have room
        self._stage(version, self._gather(copy=True))
        return self._tensors

    def _stage(self, version: int, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        with on_device_of(tensors):
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # what reads them runs on other streams

    def _staged(self) -> Mapping[str, Tensor]:
        return self._tensors

    async def _transfer(self, client: VllmClient) -> None:
        remote = Remote(client, asyncio.get_running_loop())
        async with self._turn:
            await asyncio.to_thread(self._send, remote, client)

    def _send(self, remote: Remote, client: VllmClient) -> None:
        tensors = self._tensors
        with on_device_of(tensors):
            if client not in self._senders:
                self._leave_the_dead()
                self._senders[client] = self._open(remote, client, tensors)
            self._senders[client].send(tensors)

    def _leave_the_dead(self) -> None:
        alive = {replica.client for replica in self._engine.replicas}
        for client in [client for client in self._senders if client not in alive]:
            self._senders.pop(client).close()


def on_device_of(tensors: Mapping[str, Tensor]) -> AbstractContextManager[None]:
    """Their GPU as the current one: a thread begins on the first. Nothing for tensors on a CPU, as tests have them."""
    device = next(iter(tensors.values())).device
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def check_transfer(sync: WeightSyncConfig, inference: VllmConfig, device: str) -> None:
    """Raise `ConfigError` where this machine's GPUs do not allow `sync`. `device` is `model.device`."""
    if sync.kind not in WEIGHT_TRANSFERS:
        return
    if not torch.cuda.is_available():
        raise ConfigError(
            f"weight_sync={sync.kind} requires a GPU that torch can use, else there is nothing to send from: set "
            "weight_sync=folder"
        )
    if vllm_version() is None:
        raise ConfigError(
            f"weight_sync={sync.kind} requires vLLM here too, for the trainer's side of its weight transfer: "
            "pip install 'vlmrl[vllm]' in the version that the servers have, or set weight_sync=folder"
        )
    if not inference.starts_servers:
        return
    check_places(sync, inference, device, visible_devices())


def check_places(sync: WeightSyncConfig, inference: VllmConfig, device: str, devices: list[str]) -> None:
    """Whether the servers are on the GPUs, out of `devices`, that `sync` needs them on. Raises `ConfigError`.

    >>> from vlmrl.config.weight_sync import CudaIpcSyncConfig
    >>> check_places(CudaIpcSyncConfig(), VllmConfig(), "auto", ["0"])
    """
    trainer = devices[torch.device("cuda" if device == "auto" else device).index or 0]
    taken = {gpu for replica in range(inference.replicas) for gpu in replica_devices(replica, inference, devices)}
    if sync.kind == "cuda_ipc" and taken != {trainer}:
        raise ConfigError(
            f"weight_sync=cuda_ipc requires every server on the trainer's GPU {trainer}, else one on another cannot "
            f"open its memory, and they are on {','.join(sorted(taken))}: set weight_sync=nccl, or "
            f"CUDA_VISIBLE_DEVICES={trainer} with inference.tensor_parallel_size=1 inference.data_parallel_size=1"
        )
    if sync.kind == "nccl" and trainer in taken:
        raise ConfigError(
            f"weight_sync=nccl requires servers on other GPUs than the trainer's {trainer}, else NCCL refuses two "
            f"ranks on one GPU: set weight_sync={'cuda_ipc' if len(devices) == 1 else 'folder'}, or fewer "
            f"inference.replicas than the {len(devices)} visible GPUs hold beside the trainer"
        )
