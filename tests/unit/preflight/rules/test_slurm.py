"""Which Slurm jobs are refused for a configuration before they are submitted."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from omegaconf import OmegaConf

from vlmrl.cli.hydra_job import submission_of
from vlmrl.config.run import RunConfig
from vlmrl.errors import ConfigError
from vlmrl.preflight.check import Stage, check
from vlmrl.preflight.rules.slurm import weights_cross_nodes
from vlmrl.preflight.site import Site

NO_EVALUATION = ("orchestrator.eval.problems=0", "orchestrator.eval.every=0")
SERVES = ("inference=vllm", "inference.slurm_tasks=1")


@pytest.mark.parametrize(
    ("launcher", "overrides", "message"),
    [
        (
            {"nodes": 1, "tasks_per_node": 1},
            (),
            r"slurm_tasks=1 takes every task of hydra\.launcher\.nodes=1 .*_node=2$",
        ),
        ({"nodes": 2, "tasks_per_node": 1}, (), r"weight_sync\.root=/dev/shm exists on one node only"),
        ({"n_jobs": 2}, (), "set hydra/launcher=slurm"),
        ({"nodes": 2, "tasks_per_node": 4}, ("weight_sync.root=/scratch",), None),
        ({"nodes": 1, "tasks_per_node": 2}, (), None),
        ({"nodes": 1, "tasks_per_node": 3}, ("inference=embedded",), None),
        ({"nodes": 1, "tasks_per_node": 2}, ("inference=embedded", "trainer.sharding=optimizer"), None),
        (
            {"nodes": 1, "tasks_per_node": 2},
            ("inference=embedded", "mode=sft", "trainer.warmup.steps=1", *NO_EVALUATION),
            None,
        ),
        ({"nodes": 1, "tasks_per_node": 3}, ("model.device=cuda:0",), "model.device=cuda:0 names one GPU"),
        (
            {"nodes": 9, "tasks_per_node": 32},
            ("weight_sync.root=/x", "orchestrator.group_size=2"),
            "18 rollouts .* for 287 ranks",
        ),
    ],
)
def test_tasks_that_the_launcher_starts(
    launcher: dict[str, int], overrides: tuple[str, ...], message: str | None, run_config: Callable[..., RunConfig]
) -> None:
    serves = () if "inference=embedded" in overrides else SERVES
    config = run_config(*serves, *overrides)
    if message is None:
        check(config, Stage.submitted, submission_of(OmegaConf.create(launcher)))
    else:
        with pytest.raises(ConfigError, match=message):
            check(config, Stage.submitted, submission_of(OmegaConf.create(launcher)))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("inference.replicas=2",), r"puts all servers on those tasks.* inference\.replicas=2 would have no effect"),
        (("inference.urls=[http://h:1]",), r"inference\.urls would have no effect"),
        (("weight_sync=cuda_ipc",), "set weight_sync=nccl or weight_sync=folder"),
    ],
)
def test_servers_have_one_place(overrides: tuple[str, ...], message: str, run_config: Callable[..., RunConfig]) -> None:
    with pytest.raises(ConfigError, match=message):
        check(run_config(*SERVES, *overrides), Stage.composed)


def test_one_node_needs_no_network_disk(run_config: Callable[..., RunConfig]) -> None:
    weights_cross_nodes(run_config(*SERVES), Site(nodes=1))
    weights_cross_nodes(run_config("inference=vllm"), Site(nodes=2))
