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

from vlmrl.config.weight_sync import ServerSyncConfig
from vlmrl.inference.vllm.arguments import WeightTransfer
from vlmrl.inference.vllm.client import VllmClient
from vlmrl.inference.vllm.engine import VllmEngine
from vlmrl.weight_sync.servers import ServerSync
from vlmrl.weight_sync.vllm_transfer import Remote, Sender

WEIGHT_TRANSFERS: dict[str, WeightTransfer] = {"nccl": "nccl", "cuda_ipc": "ipc"}
"""`weight_sync.kind` → the weight-transfer engine that vLLM must be started with. Other kinds need none."""


class GpuSync(ServerSync):
    """Base class of the transports from the trainer's GPU to the servers' GPUs."""

    def __init__(
        self,
        engine: VllmEngine,
        weights: Callable[[], Mapping[str, Tensor]],
        config: ServerSyncConfig,
        tower_version: Callable[[], int | None] = lambda: None,
    ) -> None:
        """As `ServerSync`."""
        super().__init__(engine, weights, config, tower_version)
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
