"""`weight_sync`: how a policy version reaches the engine. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING


@dataclass
class WeightSyncConfig:
    """What every way of publishing has."""

    kind: str = MISSING
    """Which one; said by its schema, chosen with `weight_sync=`, and by `inference=` for most runs."""


@dataclass
class InProcessSyncConfig(WeightSyncConfig):
    """The embedded engine reads the trainer's own weights: nothing travels."""

    kind: str = "in_process"
    """For `inference=embedded` only."""


@dataclass
class FolderSyncConfig(WeightSyncConfig):
    """Through a folder that trainer and servers both see: one safetensors file per version, read by vLLM in place."""

    kind: str = "folder"
    """`folder`: works for every engine, CPU or GPU, on this machine or, over a network disk, on others."""
    root: str = "/dev/shm"
    """Where the run makes its folder, which holds one or two copies of the weights. Shared memory by default, because
    a disk would be the slowest part of a step; for servers on other machines, a folder that they see too."""
    verify: bool = False
    """Compare the SHA-256 of every weight in every server with the trainer's after each publish. Reads all weights
    twice, so it is for finding out whether a set-up works, not for every step."""


@dataclass
class NcclSyncConfig(WeightSyncConfig):
    """From GPU to GPU through vLLM's weight transfer, for servers on other GPUs than the trainer's, this host's or
    another's. The trainer's GPU holds a second copy of the weights in `inference.dtype`, and room for two buckets of
    half a GiB or so."""

    kind: str = "nccl"
    """`nccl`: the fastest where the trainer has a GPU of its own."""
    verify: bool = False
    """As `folder`'s."""


@dataclass
class CudaIpcSyncConfig(WeightSyncConfig):
    """Through the memory of the one GPU that trainer and servers share, by vLLM's weight transfer. The GPU holds a
    third copy of the weights, in `inference.dtype`, beside the trainer's and the server's.

    Servers read pickles of whoever has their key (VLLM_ALLOW_INSECURE_SERIALIZATION=1), so who has it can run code as
    the server's user; those that the run starts listen on this host alone, with a random key.
    """

    kind: str = "cuda_ipc"
    """`cuda_ipc`: the fastest where trainer and servers share one GPU."""
    verify: bool = False
    """As `folder`'s."""
