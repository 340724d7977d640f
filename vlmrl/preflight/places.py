"""Which process runs on which device, and whether the devices are there and have room.

The trainer's ranks are on the first GPUs, the servers on the last (`replica_devices`), so they meet only where there
are not enough. What is refused is what cannot work; where no GPU is visible nothing is known about the machine that the
run is meant for, and nothing is refused.
"""

from __future__ import annotations

from dataclasses import dataclass

from vlmrl.config.inference import VllmConfig
from vlmrl.config.run import Mode, RunConfig
from vlmrl.config.trainer import Optimizer
from vlmrl.errors import ConfigError
from vlmrl.inference.vllm.server import replica_devices
from vlmrl.preflight.estimate.memory import SERVER_BYTES, server_memory, trainer_memory
from vlmrl.preflight.estimate.sizes import Sizes
from vlmrl.preflight.machine import Gpu, Machine

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
    return trainer + [
        Process(f"vLLM server {replica}", tuple(replica_devices(replica, own, gpus)) if gpus else ())
        for replica in range(own.replicas)
    ]


def check_machine(config: RunConfig, machine: Machine, sizes: Sizes, ranks: int) -> None:
    """Raise `ConfigError` where this machine's GPUs cannot hold the run."""
    if not machine.gpus or config.model.device == "cpu":
        return
    own = config.inference if isinstance(config.inference, VllmConfig) and config.inference.starts_servers else None
    _check_count(config, own, len(machine.gpus), machine.ranks)
    started = processes(config, ranks, [gpu.index for gpu in machine.gpus])
    for gpu in machine.gpus:
        here = [process.name for process in started if gpu.index in process.devices]
        servers = sum(name.startswith("vLLM") for name in here)
        share = servers * own.gpu_memory_utilization if own else 0.0
        if own and share > 1:
            raise ConfigError(
                f"inference.gpu_memory_utilization={own.gpu_memory_utilization} requires a GPU for each server, else "
                f"the {servers} on GPU {gpu.index} want {share:.0%} of it: lower it, or inference.replicas"
            )
        if own and servers:
            _check_server(own, sizes, gpu.memory)
        if len(here) > servers and config.mode in (Mode.rl, Mode.sft):
            _check_trainer(config, sizes, gpu, share, ranks)
    if config.mode in (Mode.rl, Mode.sft):
        _check_host(config, sizes, machine, ranks)


def _check_count(config: RunConfig, own: VllmConfig | None, gpus: int, ranks: int) -> None:
    needed = gpus_needed(config, ranks)
    if needed <= gpus:
        return
    parts, remedy = [f"{ranks} trainer rank{'s' * (ranks > 1)}"], "start fewer ranks"
    if own:
        parts += [f"inference.replicas={own.replicas}", f"inference.tensor_parallel_size={own.tensor_parallel_size}"]
        remedy = "lower them" + (", set weight_sync=cuda_ipc" if gpus == 1 else "")
    raise ConfigError(
        f"{', '.join(parts)} with weight_sync={config.weight_sync.kind} require {needed} GPUs, else there is nowhere "
        f"to start them, and {gpus} {'is' if gpus == 1 else 'are'} visible here: {remedy}, or show more in "
        "CUDA_VISIBLE_DEVICES"
    )


def _check_trainer(config: RunConfig, sizes: Sizes, gpu: Gpu, share: float, ranks: int) -> None:
    """`share` of the GPU is vLLM's."""
    trainer = trainer_memory(config, sizes, rows=0, loss_tokens=0, ranks=ranks)
    if trainer is None or trainer.fixed <= (1 - share) * gpu.memory:
        return
    beside = f", {share:.0%} of it for vLLM (inference.gpu_memory_utilization)" if share else ""
    remedies = ["trainer.optimizer=adamw_8bit"] * (config.trainer.optimizer is Optimizer.adamw)
    remedies += ["trainer.cpu_offload=true"] * (not config.trainer.cpu_offload)
    remedies += ["a lower inference.gpu_memory_utilization"] * (share > 0)
    raise ConfigError(
        f"model.name={config.model.name} requires {trainer.fixed / GIB:.0f} GiB of each rank's GPU before the first "
        f"token, else it runs out of memory: GPU {gpu.index} has {gpu.memory / GIB:.0f} GiB{beside}: set "
        f"{', '.join([*remedies, 'a smaller model'])}, or start more ranks"
    )


def _check_host(config: RunConfig, sizes: Sizes, machine: Machine, ranks: int) -> None:
    trainer = trainer_memory(config, sizes, rows=0, loss_tokens=0, ranks=ranks)
    needed = trainer.on_host * machine.ranks if trainer is not None else 0
    if needed > machine.memory:
        raise ConfigError(
            f"trainer.cpu_offload=true requires {needed / GIB:.0f} GiB of the host's memory, else the run is killed, "
            f"and it has {machine.memory / GIB:.0f} GiB: set trainer.optimizer=adamw_8bit, or take more GPUs and set "
            "trainer.cpu_offload=false"
        )


def _check_server(config: VllmConfig, sizes: Sizes, memory: int) -> None:
    server = server_memory(config, sizes)
    if server is not None and server.weights > config.gpu_memory_utilization * memory - SERVER_BYTES:
        raise ConfigError(
            f"inference.gpu_memory_utilization={config.gpu_memory_utilization} requires more of the GPU's "
            f"{memory / GIB:.0f} GiB, else the {server.weights / GIB:.1f} GiB of weights leave no room for a key-value "
            "cache: raise it, or inference.tensor_parallel_size"
        )
