"""vLLM's weight-transfer API, the trainer's side: what differs between its versions, and nothing else.

    sender ── init_weight_transfer_engine, start_weight_update, update_weights, finish_weight_update ─▶ server (HTTP)
           ══ the tensors' data, by NCCL or CUDA IPC ═════════════════════════════════════════════════▶ its workers

vLLM 0.32 has an object for all of this, which is given an HTTP client and a source of tensors. 0.26 has functions that
move the data, and the calls around them are the trainer's. The paths of the server are the same. `Remote` is that HTTP
client for both, over the run's own: vLLM's has no API key, and a dead server would be told from a wrong answer by no
one. vLLM is imported in the functions that use it: importing it takes seconds, and most runs do without.

0.26 packs tensors for IPC into one buffer which its workers release once per bucket, and the trainer's GPU never gets
it back (0.32's `PackedBufferImporter` says why). So IPC is not packed here: a handle per tensor, all in one call.
"""

from __future__ import annotations

import asyncio
import base64
import pickle
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor

from vlmrl.inference.vllm.client import VllmClient
from vlmrl.inference.vllm.server import NEW_SINCE

BUCKET_BYTES = 256 * 1024**2
"""Of tensors that go through NCCL in one broadcast; two are under way at a time. A larger tensor is a bucket alone."""


class Sender(Protocol):
    """One server life's transfer engine. Its methods block, and belong in a thread that is not the event loop's."""

    def send(self, tensors: Mapping[str, Tensor]) -> None:
        """Have the server, which is paused, load `tensors`; they are its own again when this returns. Raises what
        `VllmClient.call` does."""

    def close(self) -> None:
        """Give up what it holds, also while `send` runs, which fails then."""


class Remote:
    """The server's control endpoints as vLLM's `VLLMWeightSyncClient`, for threads other than the event loop's."""

    def __init__(self, client: VllmClient, loop: asyncio.AbstractEventLoop) -> None:
        self._client = client
        self._loop = loop
        self.on_failure: Callable[[], None] = lambda: None
        """Called, in the caller's thread, when an update has failed: nobody will take what is being broadcast."""

    def world_size(self) -> int:
        """Workers behind the server: tensor-parallel ranks times data-parallel ones."""
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
        """The version is told by whoever publishes (servers.py), when the caches are dropped too."""
        assert weight_version is None
        self._call("POST", "/finish_weight_update")

    def _call(self, method: str, path: str, **arguments: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(self._client.call(method, path, **arguments), self._loop).result()


class Source:
    """Tensors as vLLM 0.32 asks a trainer for them (its `WeightSource`)."""

    def __init__(self) -> None:
        self.tensors: Mapping[str, Tensor] = {}

    def metadata(self) -> list[Any]:
        from vllm.distributed.weight_transfer.base import ParamMeta

        return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.tensors.items()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self.tensors.items())


def announced(tensors: Mapping[str, Tensor]) -> dict[str, list[Any]]:
    """What 0.26's workers are told to expect, in the order of sending.

    >>> announced({"norm": torch.ones(2, dtype=torch.bfloat16), "bias": torch.zeros(3, 1)})
    {'names': ['norm', 'bias'], 'dtype_names': ['bfloat16', 'float32'], 'shapes': [[2], [3, 1]]}
    """
    return {
        "names": list(tensors),
        "dtype_names": [str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()],
        "shapes": [list(tensor.shape) for tensor in tensors.values()],
    }


def as_json(update_info: Mapping[str, Any]) -> dict[str, Any]:
    """`update_info` for HTTP: IPC handles are objects of torch, and travel pickled.

    >>> sorted(as_json({"names": ["w"], "ipc_handles": [{"GPU-1": (0,)}]}))
    ['ipc_handles_pickled', 'names']
    """
    plain = {name: value for name, value in update_info.items() if value is not None}
    handles = plain.pop("ipc_handles", None)
    if handles is not None:
        plain["ipc_handles_pickled"] = base64.b64encode(pickle.dumps(handles)).decode()
    return plain


def bucket_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Both sides cut their buckets by it, so it must be the same for all sends of a sender."""
    return max(BUCKET_BYTES, *(tensor.nbytes for tensor in tensors.values()))


# ── CUDA IPC ────────────────────────────────────────────────────────────────────────────────────────────────


def ipc_sender(remote: Remote, version: tuple[int, int]) -> Sender:
    """Of the current CUDA device. `version` is that of vLLM, here and there."""
    if version < NEW_SINCE:
        remote.init_weight_transfer_engine({})
        return OldIpcSender(remote)
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo, IPCTrainerWeightTransferEngine

    source = Source()
    init_info = IPCTrainerInitInfo(rank=0, packed=False)
    return NewSender(IPCTrainerWeightTransferEngine.trainer_init(init_info, client=remote, source=source), source)


class OldIpcSender:
    """vLLM 0.26."""

    def __init__(self, remote: Remote) -> None:
        self._remote = remote

    def send(self, tensors: Mapping[str, Tensor]) -> None:
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerSendWeightsArgs, IPCWeightTransferEngine

        args = IPCTrainerSendWeightsArgs(send_mode=lambda info: self._remote.update_weights(vars(info)), packed=False)
        self._remote.start_weight_update()
        IPCWeightTransferEngine.trainer_send_weights(iter(tensors.items()), args)
        self._remote.finish_weight_update()
        torch.cuda.ipc_collect()  # type: ignore[no-untyped-call]  # what the workers have released with the last call

    def close(self) -> None:
        """Nothing is held."""


# ── NCCL ────────────────────────────────────────────────────────────────────────────────────────────────────


def nccl_sender(remote: Remote, version: tuple[int, int], *, address: str, port: int, bucket_bytes: int) -> Sender:
    """A group of the current CUDA device and the server's workers, who meet at `address`:`port`, which is ours."""
    world_size = 1 + remote.world_size()
    if version < NEW_SINCE:
        from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

        meeting = {"master_address": address, "master_port": port, "rank_offset": 1, "world_size": world_size}
        with ThreadPoolExecutor(1) as pool:
            joined = pool.submit(remote.init_weight_transfer_engine, meeting)
            group = NCCLWeightTransferEngine.trainer_init(meeting)
            joined.result()
        return OldNcclSender(remote, group, bucket_bytes)
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
    sender = NewSender(NCCLTrainerWeightTransferEngine.trainer_init(init_info, client=remote, source=source), source)
    remote.on_failure = sender.close
    return sender


class OldNcclSender:
    """vLLM 0.26."""

    def __init__(self, remote: Remote, group: Any, bucket_bytes: int) -> None:
        self._remote = remote
        self._group = group
        self._bucket_bytes = bucket_bytes
        remote.on_failure = self.close

    def send(self, tensors: Mapping[str, Tensor]) -> None:
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerSendWeightsArgs, NCCLWeightTransferEngine

        buckets = {"packed": True, "packed_buffer_size_bytes": self._bucket_bytes}
        self._remote.start_weight_update()
        with ThreadPoolExecutor(1) as pool:  # the workers take part in the broadcast inside this call
            updated = pool.submit(self._remote.update_weights, announced(tensors) | buckets)
            args = NCCLTrainerSendWeightsArgs(group=self._group, **buckets)
            NCCLWeightTransferEngine.trainer_send_weights(iter(tensors.items()), args)
            updated.result()
        self._remote.finish_weight_update()
        torch.cuda.synchronize()  # 0.26 returns with the last buckets still on their way

    def close(self) -> None:
        self._group.destroy()  # aborts what hangs


class NewSender:
    """vLLM 0.32, whose object makes the calls too."""

    def __init__(self, engine: Any, source: Source) -> None:
        self._engine = engine
        self._source = source
        self._closing = threading.Lock()

    def send(self, tensors: Mapping[str, Tensor]) -> None:
        self._source.tensors = tensors
        try:
            self._engine.send_weights()
        finally:
            self._source.tensors = {}

    def close(self) -> None:
        with self._closing:
            self._engine.shutdown()  # of NCCL: aborts what hangs
