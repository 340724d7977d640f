"""Machines that the run would or would not start on."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from vlmrl.config import RunConfig
from vlmrl.errors import ConfigError
from vlmrl.plan.machine import Gpu, Machine
from vlmrl.plan.memory import trainer_memory
from vlmrl.plan.places import check_machine, gpus_needed, processes
from vlmrl.plan.sizes import Sizes, find_sizes


def machine(*gib: int) -> Machine:
    return Machine(tuple(Gpu(str(index), "H100", size << 30) for index, size in enumerate(gib)), 16, 128 << 30)


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
            "^1 trainer rank, .* require 2 GPUs, .* 1 is visible",
        ),
        ((*VLLM, "inference.tensor_parallel_size=4"), (80, 80), 1, 2e9, "require 4 GPUs, .* and 2 are visible"),
        (("model=qwen3vl",), (80,), 2, 2e9, "^2 trainer ranks with .* require 2 GPUs, .*: start fewer ranks"),
        (("model=qwen3vl",), (24,), 1, 9e9, r"requires \d+ GiB for weights, gradients .* GPU 0 has 24 GiB: take"),
        (VLLM, (80,), 1, 6e9, r"GPU 0 has 80 GiB, 50% of it for vLLM .* or lower inference.gpu_memory_utilization"),
        (
            (*VLLM, "inference.replicas=2", "inference.gpu_memory_utilization=0.6"),
            (80,),
            1,
            1e9,
            "the 2 on GPU 0 want 1",
        ),
        ((*VLLM, "weight_sync=nccl"), (80, 24), 1, 6e9, r"the 11.2 GiB of weights leave no room .*: raise it, or"),
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
        check_machine(run_config(*overrides), machine(*gib), of(parameters), ranks)


@pytest.mark.parametrize(
    ("overrides", "gib", "ranks", "parameters"),
    [
        ((), (), 1, 4e5),
        (("model=qwen3vl",), (), 8, 4e9),  # of a machine without GPUs nothing is concluded
        ((*VLLM, "weight_sync=nccl"), (80, 80), 1, 2e9),
        (VLLM, (80,), 1, 2e9),
        ((*VLLM, "inference.urls=[http://127.0.0.1:8000]"), (80,), 1, 2e9),
        (("model=qwen3vl", "model.device=cpu"), (8,), 1, 4e9),
    ],
)
def test_not_refused(
    overrides: tuple[str, ...],
    gib: tuple[int, ...],
    ranks: int,
    parameters: float,
    run_config: Callable[..., RunConfig],
) -> None:
    check_machine(run_config(*overrides), machine(*gib), of(parameters), ranks)


def test_who_is_where(run_config: Callable[..., RunConfig]) -> None:
    config = run_config(*VLLM, "weight_sync=nccl", "inference.replicas=2", "inference.tensor_parallel_size=2")
    assert gpus_needed(config, ranks=2) == 6
    started = {process.name: process.devices for process in processes(config, 2, list("012345"))}
    assert started == {
        "trainer and orchestrator": ("0",),
        "trainer rank 1": ("1",),
        "vLLM server 0": ("2", "3"),
        "vLLM server 1": ("4", "5"),
    }
    assert [process.devices for process in processes(run_config(), 1, [])] == [()]


def test_what_the_optimizer_holds_is_what_was_said(run_config: Callable[..., RunConfig]) -> None:
    """Of the default run: the tensors of a real step, in bytes."""
    import torch

    config = run_config()
    sizes = find_sizes(config.model)
    assert sizes.parameters is not None
    weight = torch.nn.Parameter(torch.zeros(sizes.parameters, dtype=torch.float32))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    state = [value for value in optimizer.state[weight].values() if value.numel() > 1]
    held = sum(tensor.numel() * tensor.element_size() for tensor in (weight, weight.grad, *state))
    memory = trainer_memory(config, sizes, rows=0, loss_tokens=0)
    assert memory is not None
    assert memory.fixed == held
