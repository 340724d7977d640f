"""`weight_sync`: how new weights reach the inference engine."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from omegaconf import MISSING

from vlmrl.config.fields import Resume, setting


@dataclass
class WeightSyncConfig:
    """What every way of weight sync has."""

    kind: str = setting(MISSING, on_resume=Resume.refused)
    """The way of weight sync; set by the option that `weight_sync=` chooses. `inference=` chooses a fitting one."""


@dataclass
class InProcessSyncConfig(WeightSyncConfig):
    """The embedded engine reads the trainer's own weights; nothing is copied."""

    kind: str = setting("in_process", on_resume=Resume.refused)
    """For `inference=embedded` only."""


class RunningRequests(Enum):
    """What a request does that runs in a server while new weights come in."""

    recompute = "recompute"
    keep = "keep"


@dataclass
class ServerSyncConfig:
    """What every way of weight sync to vLLM servers has besides."""

    running_requests: RunningRequests = setting(RunningRequests.recompute, on_resume=Resume.free)
    """What becomes of requests that run in a server during a weight sync. `recompute`: their keys and values are
    computed again, so each later token is sampled from exactly the new policy. `keep`: they go on at once with the keys
    and values of the older weights, which saves up to two seconds after each weight sync, and their later tokens come
    from neither policy; `mismatch_kl/after_update` says how far they are from the new one. Only for servers that the
    run starts."""
    verify: bool = setting(False, on_resume=Resume.free)
    """After each weight sync, compare the SHA-256 of every weight in every server with the trainer's."""


@dataclass
class FolderSyncConfig(WeightSyncConfig, ServerSyncConfig):
    """Weights go through a folder that trainer and servers both see: one safetensors file per version, which vLLM reads
    in place."""

    kind: str = setting("folder", on_resume=Resume.refused)
    """`folder` works for every engine: on CPU or GPU, on this machine or, over a network disk, on others."""
    root: str = setting("/dev/shm", on_resume=Resume.free)
    """Where the run makes its folder, which holds one or two copies of the weights. The default is shared memory,
    because a disk would be the slowest part of a step. For servers on other machines, name a folder that they also
    see."""
    verify: bool = setting(False, on_resume=Resume.free)
    """After each weight sync, compare the SHA-256 of every weight in every server with the trainer's. It reads all
    weights twice, so use it to test a set-up, not in every run."""


@dataclass
class NcclSyncConfig(WeightSyncConfig, ServerSyncConfig):
    """Weights go from GPU to GPU through vLLM's weight transfer, for servers on other GPUs than the trainer's, on this
    host or another. The trainer's GPU holds a second copy of the weights in `inference.dtype`, and room for two buckets
    of about half a GiB."""

    kind: str = setting("nccl", on_resume=Resume.refused)
    """`nccl` is the fastest way where the trainer has a GPU of its own."""


@dataclass
class CudaIpcSyncConfig(WeightSyncConfig, ServerSyncConfig):
    """Weights go through the memory of the one GPU that trainer and servers share, by vLLM's weight transfer. The GPU
    holds a third copy of the weights, in `inference.dtype`, next to the trainer's and the server's.

    The servers unpickle what clients with their key send (VLLM_ALLOW_INSECURE_SERIALIZATION=1), so anyone who has the
    key can run code as the server's user. Servers that the run starts listen on this host only, with a random key.
    """

    kind: str = setting("cuda_ipc", on_resume=Resume.refused)
    """`cuda_ipc` is the fastest way where trainer and servers share one GPU."""
