"""Which process of a run is on which GPU."""

from __future__ import annotations

from collections.abc import Callable

from vlmrl.config.run import RunConfig
from vlmrl.preflight.places import gpus_needed, processes

VLLM = ("model=qwen3vl", "inference=vllm")


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
