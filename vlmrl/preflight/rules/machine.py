"""The GPUs and the memory of this machine hold what the run starts on it.

Where no GPU is visible nothing is known about the machine that the run is meant for, so nothing is refused.
"""

from __future__ import annotations

from vlmrl.config.inference import VllmConfig
from vlmrl.config.run import LEARN, Mode, RunConfig
from vlmrl.config.trainer import Optimizer
from vlmrl.errors import ConfigError
from vlmrl.preflight.estimate.memory import SERVER_BYTES, StepTokens, server_memory, trainer_memory
from vlmrl.preflight.estimate.sizes import Sizes, find_sizes
from vlmrl.preflight.machine import Gpu, Machine
from vlmrl.preflight.places import GIB, gpus_needed, processes
from vlmrl.preflight.site import Site


def gpus_hold_the_run(config: RunConfig, site: Site) -> None:
    """Enough GPUs are visible, and each one has room for the processes on it."""
    if config.mode is Mode.export or config.model.device == "cpu" or site.serves or not site.machine.gpus:
        return
    refuse_machine(config, site.machine, find_sizes(config.model), site.ranks)


def refuse_machine(config: RunConfig, machine: Machine, sizes: Sizes, ranks: int) -> None:
    """Raise `ConfigError` where `machine` cannot hold the run of `ranks` trainer ranks."""
    own = config.inference if isinstance(config.inference, VllmConfig) and config.inference.starts_servers else None
    _refuse_count(config, own, len(machine.gpus), machine.ranks)
    started = processes(config, ranks, [gpu.index for gpu in machine.gpus])
    for gpu in machine.gpus:
        here = [process.name for process in started if gpu.index in process.devices]
        servers = sum(name.startswith("vLLM") for name in here)
        share = servers * own.gpu_memory_utilization if own else 0.0
        if own and share > 1:
            raise ConfigError(
                f"inference.gpu_memory_utilization={own.gpu_memory_utilization} gives {share:.0%} of GPU {gpu.index} "
                f"to the {servers} servers on it, so the last one finds no memory: lower it, or inference.replicas"
            )
        if own and servers:
            _refuse_server(own, sizes, gpu.memory)
        if len(here) > servers and config.mode in (*LEARN, Mode.bench):
            _refuse_trainer(config, sizes, gpu, share, ranks)
    if config.mode in (*LEARN, Mode.bench):
        _refuse_host(config, sizes, machine, ranks)


def _refuse_count(config: RunConfig, own: VllmConfig | None, gpus: int, ranks: int) -> None:
    needed = gpus_needed(config, ranks)
    if needed <= gpus:
        return
    parts, remedy = [f"{ranks} trainer rank{'s' * (ranks > 1)}"], "start fewer ranks"
    if own:
        parts += [f"inference.replicas={own.replicas}", f"inference.tensor_parallel_size={own.tensor_parallel_size}"]
        remedy = "lower them" + (", set weight_sync=cuda_ipc" if gpus == 1 else "")
    raise ConfigError(
        f"{', '.join(parts)} with weight_sync={config.weight_sync.kind} need {needed} GPUs, and {gpus} "
        f"{'is' if gpus == 1 else 'are'} visible here, so some processes could not start: {remedy}, or show more GPUs "
        "in CUDA_VISIBLE_DEVICES"
    )


def _refuse_trainer(config: RunConfig, sizes: Sizes, gpu: Gpu, share: float, ranks: int) -> None:
    """`share` of the GPU belongs to vLLM's servers."""
    trainer = trainer_memory(config, sizes, StepTokens(0, 0), ranks)
    if trainer is None or trainer.fixed <= (1 - share) * gpu.memory:
        return
    servers = f", {share:.0%} of it for vLLM (inference.gpu_memory_utilization)" if share else ""
    remedies = ["trainer.optimizer=adamw_8bit"] * (config.trainer.optimizer is Optimizer.adamw)
    remedies += ["trainer.cpu_offload=true"] * (not config.trainer.cpu_offload)
    remedies += ["a lower inference.gpu_memory_utilization"] * (share > 0)
    raise ConfigError(
        f"model.name={config.model.name} takes {trainer.fixed / GIB:.0f} GiB of each rank's GPU before the first "
        f"token, and GPU {gpu.index} has {gpu.memory / GIB:.0f} GiB{servers}, so the trainer would run out of memory: "
        f"set {', '.join([*remedies, 'a smaller model'])}, or start more ranks"
    )


def _refuse_host(config: RunConfig, sizes: Sizes, machine: Machine, ranks: int) -> None:
    trainer = trainer_memory(config, sizes, StepTokens(0, 0), ranks)
    needed = trainer.on_host * machine.ranks if trainer is not None else 0
    if needed > machine.memory:
        raise ConfigError(
            f"trainer.cpu_offload=true takes {needed / GIB:.0f} GiB of this host's memory, which has "
            f"{machine.memory / GIB:.0f} GiB, so the run would be killed: set trainer.optimizer=adamw_8bit, or take "
            "more GPUs and set trainer.cpu_offload=false"
        )


def _refuse_server(config: VllmConfig, sizes: Sizes, memory: int) -> None:
    server = server_memory(config, sizes)
    if server is not None and server.weights > config.gpu_memory_utilization * memory - SERVER_BYTES:
        raise ConfigError(
            f"inference.gpu_memory_utilization={config.gpu_memory_utilization} of the GPU's {memory / GIB:.0f} GiB is "
            f"too little: the {server.weights / GIB:.1f} GiB of weights leave no room for a KV cache: raise it, or "
            "inference.tensor_parallel_size"
        )
