"""Which process runs on which device, and whether the devices are there and have room.

The trainer's ranks are on the first GPUs, the servers on the last (`replica_devices`), so they meet only where there
are not enough. What is refused is what cannot work; where no GPU is visible nothing is known about the machine that the
run is meant for, and nothing is refused.
"""

from __future__ import annotations

from dataclasses import dataclass

from vlmrl.config.inference import VllmConfig
from vlmrl.config.run import RunConfig

GIB = 1 << 30


@dataclass(frozen=True)
class Process:
    """One that the run starts."""

    name: str
    devices: tuple[str, ...]
    """GPUs as CUDA names them; empty: the CPU, or GPUs that are not visible here."""


def uses_gpus(config: RunConfig) -> bool:
    """Whether the run is meant for GPUs: on `auto`, where the model is more than a CPU trains."""
    return config.model.device != "cpu" and (config.model.device != "auto" or config.model.tiny is None)


def gpus_needed(config: RunConfig, ranks: int) -> int:
    """The GPUs without which the run does not start.

    Servers share the trainer's where weights come through a folder or that GPU's memory; NCCL wants others.
    """
    own = config.inference
    if not isinstance(own, VllmConfig) or not own.starts_servers:
        return ranks
    servers = own.tensor_parallel_size * own.data_parallel_size
    return ranks + own.replicas * servers if config.weight_sync.kind == "nccl" else max(ranks, servers)


def processes(config: RunConfig, ranks: int, gpus: list[str]) -> list[Process]:
    """What starts where; `gpus` are those that are visible."""
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
