"""Everything that vLLM 0.26 needs and vLLM 0.32 does not.

Why it exists: the GPU machine has vLLM 0.26 with torch 2.11. All other machines have vLLM 0.32 with torch 2.13.

What a run on vLLM 0.26 loses:
- A token's policy version. The server does not report versions, so all tokens of a completion count as sampled by the
  version that was published when the request was sent. After an update in mid-completion `staleness/mean` is too high.
- A clear message for a missing image. A server that has forgotten an image answers with HTTP 200 and no tokens.
- Packed CUDA IPC. 0.26 packs tensors into one buffer that its workers release once per bucket, and the trainer's GPU
  never gets that memory back (`PackedBufferImporter` in 0.32 says why). So each tensor gets a handle of its own.

To drop the support, delete this file and what its importers do with it:
    inference/vllm/arguments.py         server flags
    inference/vllm/wire.py              `output_kind`, the shape of logprobs
    inference/vllm/client.py            a completion without tokens
    inference/vllm/completions.py       versions of a completion
    inference/vllm/in_server/route.py   a completion without tokens, versions of a completion
    weight_sync/servers.py              the weight version
    weight_sync/vllm_transfer.py        the senders, and the version that chooses them

Versions between 0.26 and 0.32 are untested.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from vlmrl.types import IntArray

if TYPE_CHECKING:
    from torch import Tensor

    from vlmrl.inference.vllm.client import VllmClient

FIRST_NEW_VERSION = (0, 27)


def is_old(version: tuple[int, int]) -> bool:
    """Whether vLLM `version` is treated as 0.26; newer ones are treated as 0.32."""
    return version < FIRST_NEW_VERSION


# ── server ──────────────────────────────────────────────────────────────────────────────────────────────────

SERVER_FLAGS: dict[str, Any] = {
    # 0.26's profiling of images fails with transformers 5.19, which the trainer needs.
    "skip_mm_profiling": True,
}
"""In place of `arguments.NEW_FLAGS`, which 0.26 does not know."""


# ── requests and answers ────────────────────────────────────────────────────────────────────────────────────

SAMPLING_PARAMS: dict[str, Any] = {
    # Final output only. Without it, 0.26 answers with the tokens of its last update.
    "output_kind": 2,
}
"""Added to the sampling parameters of every request."""


def sampled_token(entry: Mapping[str, Any]) -> int:
    """The token id of one entry of an answer's logprobs.

    >>> sampled_token({"token": "token_id:7", "logprob": -0.5})
    7
    """
    return int(str(entry["token"]).removeprefix("token_id:"))


def has_forgotten_image(num_tokens: int, *, has_hashes: bool) -> bool:
    """Whether a completion of `num_tokens` tokens says that the server lacks an image. `has_hashes`: the request
    referred to an image by its hash alone."""
    return num_tokens == 0 and has_hashes


def versions_of_request(num_tokens: int, version: int) -> IntArray:
    """int64 [C]: the policy version `version` of the request for every token."""
    return np.full(num_tokens, version, np.int64)


def weight_versions(completion: Any) -> Any:
    """The version spans of vLLM's `CompletionOutput`, inside the server; None in 0.26, which has no such field."""
    return getattr(completion, "weight_versions", None)


async def update_weight_version(client: VllmClient, version: int) -> bool:
    """Tell a server the version of its weights → whether it keeps one. 0.26 has no such endpoint."""
    answer = await client.call("POST", "/update_weight_version", json={"new_version": str(version)}, optional=True)
    return answer is not None


# ── weight transfer, the trainer's side ─────────────────────────────────────────────────────────────────────
# 0.32 has an object that moves the data and makes the HTTP calls around it. 0.26 has only functions that move the
# data. The server's paths are the same. vLLM is imported where it is used: that takes seconds.


class ControlEndpoints(Protocol):
    """The part of `weight_sync.vllm_transfer.Remote` that the senders use."""

    on_failure: Callable[[], None]

    def init_weight_transfer_engine(self, init_info: Mapping[str, Any]) -> None: ...

    def start_weight_update(self) -> None: ...

    def update_weights(self, update_info: Mapping[str, Any]) -> None: ...

    def finish_weight_update(self) -> None: ...


class IpcSender:
    """`weight_sync=cuda_ipc`: lends the tensors of the current CUDA device to the server's workers."""

    def __init__(self, remote: ControlEndpoints) -> None:
        remote.init_weight_transfer_engine({})
        self._remote = remote

    def send(self, tensors: Mapping[str, Tensor]) -> None:
        """See `weight_sync.vllm_transfer.Sender`."""
        import torch
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerSendWeightsArgs, IPCWeightTransferEngine

        args = IPCTrainerSendWeightsArgs(send_mode=lambda info: self._remote.update_weights(vars(info)), packed=False)
        self._remote.start_weight_update()
        IPCWeightTransferEngine.trainer_send_weights(iter(tensors.items()), args)
        self._remote.finish_weight_update()
        torch.cuda.ipc_collect()  # type: ignore[no-untyped-call]  # the memory that the workers have just released

    def close(self) -> None:
        """Do nothing: this sender holds no resources."""


class NcclSender:
    """`weight_sync=nccl`: broadcasts from the current CUDA device to the server's workers."""

    def __init__(
        self, remote: ControlEndpoints, *, address: str, port: int, world_size: int, bucket_bytes: int
    ) -> None:
        """Form the NCCL group of `world_size` ranks, with this process as rank 0, which listens on `address`:`port`."""
        from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

        meeting = {"master_address": address, "master_port": port, "rank_offset": 1, "world_size": world_size}
        with ThreadPoolExecutor(1) as pool:
            joined = pool.submit(remote.init_weight_transfer_engine, meeting)
            self._group = NCCLWeightTransferEngine.trainer_init(meeting)
            joined.result()
        self._remote = remote
        self._bucket_bytes = bucket_bytes
        remote.on_failure = self.close

    def send(self, tensors: Mapping[str, Tensor]) -> None:
        """See `weight_sync.vllm_transfer.Sender`."""
        import torch
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerSendWeightsArgs, NCCLWeightTransferEngine

        buckets = {"packed": True, "packed_buffer_size_bytes": self._bucket_bytes}
        self._remote.start_weight_update()
        with ThreadPoolExecutor(1) as pool:  # the workers take part in the broadcast while this call runs
            updated = pool.submit(self._remote.update_weights, announced(tensors) | buckets)
            args = NCCLTrainerSendWeightsArgs(group=self._group, **buckets)
            NCCLWeightTransferEngine.trainer_send_weights(iter(tensors.items()), args)
            updated.result()
        self._remote.finish_weight_update()
        torch.cuda.synchronize()  # 0.26 returns while the last buckets are still being sent

    def close(self) -> None:
        """Leave the group. This aborts a broadcast that hangs."""
        self._group.destroy()


def announced(tensors: Mapping[str, Tensor]) -> dict[str, list[Any]]:
    """Names, dtypes and shapes that the workers must expect, in the order of sending.

    >>> import torch
    >>> announced({"norm": torch.ones(2, dtype=torch.bfloat16), "bias": torch.zeros(3, 1)})
    {'names': ['norm', 'bias'], 'dtype_names': ['bfloat16', 'float32'], 'shapes': [[2], [3, 1]]}
    """
    return {
        "names": list(tensors),
        "dtype_names": [str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()],
        "shapes": [list(tensor.shape) for tensor in tensors.values()],
    }
