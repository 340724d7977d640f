"""Machines that the run would or would not start on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from support import helpers
from vlmrl.config.run import RunConfig
from vlmrl.errors import ConfigError
from vlmrl.preflight.estimate.memory import learning_bytes, learning_parameters, trainer_memory
from vlmrl.preflight.estimate.sizes import Sizes, find_sizes
from vlmrl.preflight.machine import Gpu, Machine
from vlmrl.preflight.places import check_machine, gpus_needed, processes


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
            "^1 trainer rank, .* require 2 GPUs, .* 1 is visible",
        ),
        ((*VLLM, "inference.tensor_parallel_size=4"), (80, 80), 1, 2e9, "require 4 GPUs, .* and 2 are visible"),
        (("model=qwen3vl",), (80,), 2, 2e9, "^2 trainer ranks with .* require 2 GPUs, .*: start fewer ranks"),
        (
            ("model=qwen3vl",),
            (24,),
            1,
            9e9,
            r"requires 151 GiB of each rank's GPU .* GPU 0 has 24 GiB: set trainer.opt",
        ),
        (VLLM, (80,), 1, 6e9, r"GPU 0 has 80 GiB, 50% of it for vLLM .* a lower inference.gpu_memory_utilization"),
        (
            (*VLLM, "inference.replicas=2", "inference.gpu_memory_utilization=0.6"),
            (80,),
            1,
            1e9,
            "the 2 on GPU 0 want 1",
        ),
        ((*VLLM, "trainer.cpu_offload=true"), (80, 24), 1, 6e9, r"the 11.2 GiB of weights leave no room .*: raise it"),
        (
            ("model=qwen3vl", "trainer.cpu_offload=true"),
            (80,),
            1,
            9e9,
            r"requires 134 GiB of the host's .* has 128 GiB",
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
        check_machine(run_config(*overrides), machine(*gib, ranks=ranks), of(parameters), ranks)


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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("offload", [False, True])
def test_what_learns_holds_what_was_said(
    dtype: str, offload: bool, run_config: Callable[..., RunConfig], tiny_model: Callable[[], Any]
) -> None:
    """The tiny model's weights, masters, gradients and averages after a step, in bytes."""
    import torch

    from vlmrl.trainer.optimizer import make_optimizer
    from vlmrl.trainer.weights import PlainWeights

    config = run_config(f"model.dtype={dtype}", f"trainer.cpu_offload={offload}", "model.device=cpu")
    model = tiny_model().to(getattr(torch, dtype))
    weights = PlainWeights(model, offload=offload, ranks=1)
    learning = list(weights.learning().values())
    optimizer = make_optimizer(config.trainer, learning)
    for parameter in model.parameters():
        parameter.sum().backward()
    optimizer.step()
    averages = [value for state in optimizer.state.values() for value in state.values() if value.numel() > 1]
    gradients = [tensor.grad for tensor in learning if tensor.grad is not None]
    held = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *learning, *gradients, *averages)}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    memory = trainer_memory(config, Sizes("a test", parameters, 0, None, None), rows=0, loss_tokens=0, ranks=1)
    assert memory is not None
    assert memory.on_host == 0, "nothing moves where the model is on a CPU"
    assert memory.fixed == pytest.approx(sum(held.values()), rel=0.01)


def test_slices_and_eight_bits(run_config: Callable[..., RunConfig]) -> None:
    def bytes_of(*overrides: str, ranks: int = 1) -> tuple[float, float]:
        return learning_bytes(run_config("model=qwen3vl", *overrides), ranks)

    assert bytes_of() == (2 + 16, 0)
    assert bytes_of("trainer.optimizer=adamw_8bit") == (2 + 10, 0)
    assert bytes_of("trainer.cpu_offload=true") == (2, 16)
    assert bytes_of(ranks=4) == (4, 0)
    assert bytes_of("trainer.sharding=none", ranks=4) == (18, 0)
    assert bytes_of("trainer.sharding=optimizer", ranks=4) == (2 + 4 + 4, 0)
    assert bytes_of("trainer.sharding=optimizer", "trainer.cpu_offload=true", ranks=4) == (2 + 4, 4)
    assert bytes_of("trainer.sharding=optimizer") == bytes_of()
    assert bytes_of("trainer.cpu_offload=true", ranks=4) == (0, 4)
    assert bytes_of("model.dtype=float32") == (16, 0)


@pytest.mark.parametrize(
    ("overrides", "learns"),
    [
        ((), 428_480),
        (("model.vlm.freeze_vision=true",), 428_480 - 301_056),
        (("model.vlm.freeze_language=true",), 301_056),
    ],
)
def test_what_is_frozen_does_not_learn(
    overrides: tuple[str, ...], learns: int, run_config: Callable[..., RunConfig]
) -> None:
    config = run_config(*overrides)
    assert learning_parameters(config, find_sizes(config.model)) == (learns, 428_480 - learns)


def test_adapters_are_counted_exactly(run_config: Callable[..., RunConfig], tiny_model: Callable[[], Any]) -> None:
    pytest.importorskip("peft")
    from vlmrl.models.lora import add_adapters

    config = run_config("model/lora=all_linear")
    config.model.tiny = helpers.TINY.tiny
    model = tiny_model()
    parameters = sum(p.numel() for p in model.parameters())
    assert config.model.lora is not None
    add_adapters(model, config.model.lora)
    adapters = sum(p.numel() for p in model.parameters()) - parameters
    assert learning_parameters(config, find_sizes(config.model)) == (adapters, parameters)


def test_recomputed_layers_keep_their_inputs_alone(run_config: Callable[..., RunConfig]) -> None:
    def activations(*overrides: str) -> int:
        config = run_config("model=qwen3vl", "model/size=2b", *overrides)
        memory = trainer_memory(config, find_sizes(config.model), rows=16384, loss_tokens=0, ranks=1)
        assert memory is not None
        assert memory.activations is not None
        return memory.activations

    assert activations() == pytest.approx(45e9, rel=0.01)
    assert activations("trainer.activation_checkpointing=true") == pytest.approx(3.4e9, rel=0.1)
