"""Machines that hold, or do not hold, what a run starts on them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from vlmrl.config.run import RunConfig
from vlmrl.errors import ConfigError
from vlmrl.preflight.estimate.sizes import Sizes
from vlmrl.preflight.machine import Gpu, Machine
from vlmrl.preflight.rules.machine import gpus_hold_the_run, refuse_machine
from vlmrl.preflight.site import Site


def machine(*gib: int, ranks: int = 1) -> Machine:
    return Machine(tuple(Gpu(str(index), "H100", size << 30) for index, size in enumerate(gib)), 16, 128 << 30, ranks)


def of(parameters: float) -> Sizes:
    return Sizes("a test", int(parameters), 0, None, None)


VLLM = ("model=qwen3vl", "inference=vllm")


@pytest.mark.parametrize(
    ("overrides", "gib", "ranks", "parameters", "message"),
    [
        (
            (*VLLM, "weight_sync=nccl"),
            (80,),
            1,
            2e9,
            "^1 trainer rank, .* need 2 GPUs, and 1 is visible",
        ),
        ((*VLLM, "inference.tensor_parallel_size=4"), (80, 80), 1, 2e9, "need 4 GPUs, and 2 are visible"),
        (("model=qwen3vl",), (80,), 2, 2e9, "^2 trainer ranks with .* need 2 GPUs, .*: start fewer ranks"),
        (
            ("model=qwen3vl",),
            (24,),
            1,
            9e9,
            r"takes 151 GiB of each rank's GPU .* GPU 0 has 24 GiB, so .*: set trainer.opt",
        ),
        (VLLM, (80,), 1, 6e9, r"GPU 0 has 80 GiB, 50% of it for vLLM .* a lower inference.gpu_memory_utilization"),
        (
            (*VLLM, "inference.replicas=2", "inference.gpu_memory_utilization=0.6"),
            (80,),
            1,
            1e9,
            "gives 120% of GPU 0 to the 2 servers on it",
        ),
        ((*VLLM, "trainer.cpu_offload=true"), (80, 24), 1, 6e9, r"the 11.2 GiB of weights leave no room .*: raise it"),
        (
            ("model=qwen3vl", "trainer.cpu_offload=true"),
            (80,),
            1,
            9e9,
            r"takes 134 GiB of this host's memory, which has 128 GiB",
        ),
    ],
)
def test_refused(
    overrides: tuple[str, ...],
    gib: tuple[int, ...],
    ranks: int,
    parameters: float,
    message: str,
    run_config: Callable[..., RunConfig],
) -> None:
    with pytest.raises(ConfigError, match=message):
        refuse_machine(run_config(*overrides), machine(*gib, ranks=ranks), of(parameters), ranks)


@pytest.mark.parametrize(
    ("overrides", "gib", "ranks", "parameters"),
    [
        ((), (), 1, 4e5),
        (("model=qwen3vl",), (), 8, 4e9),  # of a machine without GPUs nothing is concluded
        ((*VLLM, "weight_sync=nccl"), (80, 80), 1, 2e9),
        (VLLM, (80,), 1, 2e9),
        ((*VLLM, "inference.urls=[http://127.0.0.1:8000]"), (80,), 1, 2e9),
        (("model=qwen3vl", "model.device=cpu"), (8,), 1, 4e9),
        (("model=qwen3vl", "trainer.cpu_offload=true"), (24,), 1, 7e9),
        (("model=qwen3vl",), (80,) * 4, 4, 8e9),  # slices
        (("model=qwen3vl",), (80,), 16, 8e9),  # Slurm shows a task its own GPU
        (("model=qwen3vl", "mode=eval"), (24,), 1, 9e9),
        ((*VLLM, "weight_sync=nccl", "model.device=cuda:1"), (24, 80, 24), 1, 2e9),
    ],
)
def test_not_refused(
    overrides: tuple[str, ...],
    gib: tuple[int, ...],
    ranks: int,
    parameters: float,
    run_config: Callable[..., RunConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vlmrl.preflight.rules.machine.find_sizes", lambda model: of(parameters))
    site = Site(ranks=ranks)
    site.machine = machine(*gib)
    gpus_hold_the_run(run_config(*overrides), site)
