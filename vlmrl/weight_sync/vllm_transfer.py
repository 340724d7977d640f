"""The trainer's side of vLLM's weight-transfer API.

    sender ── init_weight_transfer_engine, start_weight_update, update_weights, finish_weight_update ─▶ server (HTTP)
           ══ the tensors' data, by NCCL or CUDA IPC ═════════════════════════════════════════════════▶ its workers

vLLM 0.32 has an object that moves the data and makes the HTTP calls. It takes an HTTP client (`Remote`) and a source of
tensors (`Source`). `Remote` uses the run's own HTTP client, because vLLM's sends no API key and does not tell a dead
server from a wrong response. The senders for vLLM 0.26 are in `vlmrl.inference.vllm.old_vllm`.

The functions that use vLLM import it, because the import takes seconds and most runs do not need it. CUDA IPC sends a
handle per tensor, all in one call, without packing.
"""

from __future__ import annotations

import asyncio
import base64
import pickle
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from torch import Tensor

from vlmrl.inference.vllm import old_vllm
from vlmrl.inference.vllm.client import VllmClient

BUCKET_BYTES = 256 * 1024**2
"""Tensors of one NCCL broadcast; two broadcasts run at a time. A larger tensor is a bucket of its own."""


class Sender(Protocol):
    """The transfer to one launch of one server. Its methods block, so they run outside the event loop's thread."""

    def send(self, tensors: Mapping[str, Tensor]) -> None:
        """Have the server, which is paused, load `tensors`. The server no longer reads them when this returns.

        Raises what `VllmClient.call` raises.
        """

    def close(self) -> None:
        """Release all resources. May be called while `send` runs, which then fails."""


class Remote:
    """A server's endpoints for weight transfer, for threads other than the event loop's; has the interface of vLLM's
    `VLLMWeightSyncClient`."""

    def __init__(self, client: VllmClient, loop: asyncio.AbstractEventLoop) -> None:
        """`loop` is the event loop that `client` belongs to."""
        self._client = client
        self._loop = loop
        self.on_failure: Callable[[], None] = lambda: None
        """Called in the caller's thread when an update has failed, so that a broadcast without receivers is aborted."""

    def world_size(self) -> int:
        """Number of workers behind the server: tensor-parallel ranks times data-parallel ranks."""
        found: int = self._call("GET", "/get_world_size")["world_size"]
        return found

    def init_weight_transfer_engine(self, init_info: Mapping[str, Any]) -> None:
        self._call("POST", "/init_weight_transfer_engine", json={"init_info": init_info})

    def start_weight_update(self) -> None:
        self._call("POST", "/start_weight_update")

    def update_weights(self, update_info: Mapping[str, Any]) -> None:
        try:
            self._call("POST", "/update_weights", json={"update_info": as_json(update_info)})
        except BaseException:
            self.on_failure()
            raise

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """`weight_version` is None here: `ServerSync` sets the version later, after the caches are cleared."""
        assert weight_version is None
        self._call("POST", "/finish_weight_update")

    def _call(self, method: str, path: str, **arguments: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(self._client.call(method, path, **arguments), self._loop).result()


class Source:
    """The tensors to send, in the form that vLLM 0.32 reads them from a trainer (`WeightSource`)."""

    def __init__(self) -> None:
        self.tensors: Mapping[str, Tensor] = {}

    def metadata(self) -> list[Any]:
        from vllm.distributed.weight_transfer.base import ParamMeta

        return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.tensors.items()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self.tensors.items())


EVENT_SYNC_REQUIRED = 14
"""Position of `event_sync_required` among the arguments of `torch.multiprocessing.reductions.rebuild_cuda_tensor`."""


def as_json(update_info: Mapping[str, Any]) -> dict[str, Any]:
    """`update_info` for HTTP, without entries that are None. IPC handles are torch objects, so they are pickled.

    The receiver is not to wait for the handles' CUDA events. It need not: `GpuSync` synchronizes the GPU before it
    sends. And it could not after a restart: once a process that had opened such an event is killed, no other process
    can open it ("mapping of buffer object failed", seen with torch 2.11 on an H200).

    >>> sorted(as_json({"names": ["w"], "ipc_handles": [{"GPU-1": (0,) * 15}]}))
    ['ipc_handles_pickled', 'names']
    """
    plain = {name: value for name, value in update_info.items() if value is not None}
    handles = plain.pop("ipc_handles", None)
    if handles is not None:
        handles = [{gpu: _without_event(args) for gpu, args in handle.items()} for handle in handles]
        plain["ipc_handles_pickled"] = base64.b64encode(pickle.dumps(handles)).decode()
    return plain


def _without_event(args: tuple[Any, ...]) -> tuple[Any, ...]:
    assert len(args) == EVENT_SYNC_REQUIRED + 1, f"{len(args)} arguments for rebuild_cuda_tensor"
    return (*args[:EVENT_SYNC_REQUIRED], False)


def bucket_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Size of an NCCL bucket in bytes. Trainer and workers both cut buckets by it, so a sender never changes it."""
    return max(BUCKET_BYTES, *(tensor.nbytes for tensor in tensors.values()))


def ipc_sender(remote: Remote, version: tuple[int, int]) -> Sender:
    """A CUDA IPC sender for the current CUDA device. `version` is that of vLLM, the same here and on the server."""
    if old_vllm.is_old(version):
        return old_vllm.IpcSender(remote)
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo, IPCTrainerWeightTransferEngine

    source = Source()
    init_info = IPCTrainerInitInfo(rank=0, packed=False)
    return EngineSender(IPCTrainerWeightTransferEngine.trainer_init(init_info, client=remote, source=source), source)


def nccl_sender(remote: Remote, version: tuple[int, int], *, address: str, port: int, bucket_bytes: int) -> Sender:
    """An NCCL sender: a group of the current CUDA device and the server's workers, which meet at this host's
    `address`:`port`. `version` is that of vLLM, the same here and on the server."""
    world_size = 1 + remote.world_size()
    if old_vllm.is_old(version):
        return old_vllm.NcclSender(remote, address=address, port=port, world_size=world_size, bucket_bytes=bucket_bytes)
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine

    source = Source()
    init_info = NCCLTrainerInitInfo(
        rank=0,
        master_address=address,
        master_port=port,
        world_size=world_size,
        packed=True,
        packed_buffer_size_bytes=bucket_bytes,
    )
    sender = EngineSender(NCCLTrainerWeightTransferEngine.trainer_init(init_info, client=remote, source=source), source)
    remote.on_failure = sender.close
    return sender


class EngineSender:
    """A sender that uses vLLM's own trainer-side engine, which also makes the HTTP calls."""

    def __init__(self, engine: Any, source: Source) -> None:
        """`engine` reads the tensors from `source`."""
        self._engine = engine
        self._source = source
        self._closing = threading.Lock()

    def send(self, tensors: Mapping[str, Tensor]) -> None:
        """See `Sender`."""
        self._source.tensors = tensors
        try:
            self._engine.send_weights()
        finally:
            self._source.tensors = {}

    def close(self) -> None:
        """See `Sender`. For NCCL, this aborts a broadcast that hangs."""
        with self._closing:
            self._engine.shutdown()
