"""Weight sync from GPU to GPU: the part that `weight_sync=nccl` and `weight_sync=cuda_ipc` share.

    publish ─▶ copy on the trainer's GPU (engine's dtype) ─▶ one server after another, each by a `Sender` of its own

No data goes through a disk or the host's memory.

The copy stays until the next version. A server that restarts in the middle of a training step gets it, because the
trainer's own weights are changing then; waiting for the next publish would delay rollouts by a whole step. The copy
costs 2 bytes per parameter in bfloat16, on top of the trainer's 12 to 16 (weights, gradients, AdamW's two averages),
and a millisecond per few GB. Also, other processes only ever read memory that is not being written.

Servers are updated in turn, because they share the one link out of the trainer's GPU anyway. Each launch of a server
has a sender of its own, so a server that dies breaks no other connection, and a broadcast that it leaves hanging can be
aborted.
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
from vlmrl.inference.vllm.arguments import WeightTransfer
from vlmrl.inference.vllm.client import VllmClient
from vlmrl.inference.vllm.engine import VllmEngine
from vlmrl.inference.vllm.server import replica_devices, visible_devices, vllm_version
from vlmrl.weight_sync.servers import ServerSync
from vlmrl.weight_sync.vllm_transfer import Remote, Sender

WEIGHT_TRANSFERS: dict[str, WeightTransfer] = {"nccl": "nccl", "cuda_ipc": "ipc"}
"""`weight_sync.kind` → the weight-transfer engine that vLLM must be started with. Other kinds need none."""


class GpuSync(ServerSync):
    """Base class of the transports from the trainer's GPU to the servers' GPUs."""

    def __init__(self, engine: VllmEngine, weights: Callable[[], Mapping[str, Tensor]], *, verify: bool) -> None:
        """`weights` and `verify` as for `ServerSync`."""
        super().__init__(engine, weights, verify=verify)
        self._tensors: Mapping[str, Tensor] = {}
        self._senders: dict[VllmClient, Sender] = {}
        self._turn = asyncio.Lock()

    @abstractmethod
    def _open(self, remote: Remote, client: VllmClient, tensors: Mapping[str, Tensor]) -> Sender:
        """Connect to a server that has just been launched. Runs in a thread, on the GPU of `tensors`."""

    def close(self) -> None:
        """Disconnect from all servers and free the copy."""
        for sender in self._senders.values():
            sender.close()
        self._senders.clear()
        self._tensors = {}

    def _gather_and_stage(self, version: int) -> Mapping[str, Tensor]:
        self._tensors = {}  # free the old copy first, so that the GPU never holds two
        self._stage(version, self._gather(copy=True))
        return self._tensors

    def _stage(self, version: int, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        with on_device_of(tensors):
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # the transfers read the copy on other streams

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
                self._close_stale_senders()
                self._senders[client] = self._open(remote, client, tensors)
            self._senders[client].send(tensors)

    def _close_stale_senders(self) -> None:
        """Close the senders to servers that have ended."""
        alive = {replica.client for replica in self._engine.replicas}
        for client in [client for client in self._senders if client not in alive]:
            self._senders.pop(client).close()


def on_device_of(tensors: Mapping[str, Tensor]) -> AbstractContextManager[None]:
    """Make the GPU of `tensors` the current one, because a new thread starts on the first GPU. No effect for tensors on
    a CPU, which tests use."""
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
