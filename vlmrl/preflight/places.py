"""Which process runs on which GPU.

The trainer's ranks take the first GPUs and the servers the last ones (`replica_devices`), so that they share a GPU only
where there are too few. rules/machine.py refuses what does not fit.
"""

from __future__ import annotations

from dataclasses import dataclass

from vlmrl.config.inference import VllmConfig
from vlmrl.config.model import Dtype, ModelConfig
from vlmrl.config.run import RunConfig
from vlmrl.preflight.estimate.memory import BYTES
from vlmrl.preflight.estimate.sizes import Sizes

GIB = 1 << 30


@dataclass(frozen=True)
class Process:
    """A process that the run starts."""

    name: str
    devices: tuple[str, ...]
    """GPUs as CUDA names them. Empty for the CPU, and for GPUs that are not visible here."""


def uses_gpus(config: RunConfig, sizes: Sizes) -> bool:
    """Whether the run is meant for GPUs. With `model.device=auto`, a model that is small enough for a CPU is not."""
    if config.model.device == "auto":
        return needs_gpu(config.model, known_bytes(config.model, sizes))
    return config.model.device != "cpu"


CPU_LIMIT_BYTES = 2 * GIB
"""A model with more bytes of weights is too slow to train on a CPU."""


def needs_gpu(config: ModelConfig, weight_bytes: int | None) -> bool:
    """Whether a model with so many bytes of weights is too slow on a CPU; one of unknown size is, unless it is meant
    for a CPU by its float32."""
    if config.tiny is not None:
        return False
    return config.dtype is not Dtype.float32 if weight_bytes is None else weight_bytes > CPU_LIMIT_BYTES


def known_bytes(config: ModelConfig, sizes: Sizes) -> int | None:
    """Bytes of the weights; None where the number of parameters is not known."""
    return None if sizes.parameters is None else sizes.parameters * BYTES[config.dtype]


def gpus_needed(config: RunConfig, ranks: int) -> int:
    """How many GPUs the run needs to start.

    Servers can share the trainer's GPUs where weights go through a folder or through GPU memory; NCCL needs others.
    """
    own = config.inference
    if not isinstance(own, VllmConfig) or not own.starts_servers:
        return ranks
    servers = own.tensor_parallel_size * own.data_parallel_size
    return ranks + own.replicas * servers if config.weight_sync.kind == "nccl" else max(ranks, servers)


def processes(config: RunConfig, ranks: int, gpus: list[str]) -> list[Process]:
    """The processes of the run and their GPUs, out of the visible `gpus`."""
    _, _, first = config.model.device.partition("cuda:")
    trainer = [
        Process(
            "trainer and orchestrator" if rank == 0 else f"trainer rank {rank}",
            (gpus[(int(first or 0) + rank) % len(gpus)],) if gpus else (),
        )
        for rank in range(ranks)
    ]
    own = config.inference
    if not isinstance(own, VllmConfig) or not own.starts_servers:
        return trainer
    from vlmrl.inference.vllm.server import replica_devices

    return trainer + [
        Process(f"vLLM server {replica}", tuple(replica_devices(replica, own, gpus)) if gpus else ())
        for replica in range(own.replicas)
    ]
