"""sweeps/: every ready sweep composes, and each of its jobs can run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from support.configs import checked
from vlmrl.cli.hydra_job import place, sweep_jobs, without_hydra
from vlmrl.cli.schemas import register_schemas
from vlmrl.cli.sweep.jobs import job_name
from vlmrl.config.conf_folder import CONF
from vlmrl.config.run import RunConfig
from vlmrl.trainer.loss import LOSSES

SWEEPS = sorted(path.stem for path in (CONF / "sweep").glob("*.yaml"))
JOBS = {"algorithms": 14, "learning_rate": 6, "seeds": 5, "staleness": 12}
"""Sweep → jobs; one that a sweeper makes up on its way is not among them, nor the arena, which is
looked at in parts."""

ARENA = ("arena_color_codeword", "arena_digits", "arena_room")
"""The tasks of the sweep `arena`."""


def jobs_of(sweep: str, *arguments: str) -> dict[str, RunConfig]:
    """Name → checked config of each job of `python -m vlmrl +sweep=<sweep> <arguments>`."""
    register_schemas()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        config = hydra.compose_config(
            "config", [f"+sweep={sweep}", *arguments], run_mode=RunMode.MULTIRUN, with_log_configuration=False
        )
        assert Path(config.hydra.sweep.dir) == Path("outputs/multirun", sweep)
        loader = GlobalHydra.instance().config_loader()
        jobs = sweep_jobs(config)
        configs = [without_hydra(loader.load_sweep_config(config, job)) for job in jobs]
    return {job_name(job, ""): checked(place(config, "there")) for job, config in zip(jobs, configs, strict=True)}


def test_all_sweeps_are_known() -> None:
    assert set(SWEEPS) == set(JOBS) | {"arena", "optuna"}


@pytest.mark.parametrize("sweep", JOBS)
def test_a_sweep_composes(sweep: str) -> None:
    jobs = jobs_of(sweep)
    assert len(jobs) == JOBS[sweep]


def test_the_command_line_outranks_a_sweep() -> None:
    jobs = jobs_of("algorithms", "seed=3", "algorithm=grpo,rloo", "trainer.max_steps=7")
    assert list(jobs) == [f"algorithm={name},seed=3,trainer.max_steps=7" for name in ("grpo", "rloo")]
    assert {config.seed for config in jobs.values()} == {3}


def test_the_arena_compares_options_as_they_are(composed: Callable[..., DictConfig]) -> None:
    jobs = jobs_of("arena", "algorithm=ppo", "trainer.learning_rate=4e-4", "seed=0")
    assert len(jobs) == len(ARENA)
    params = OmegaConf.load(CONF / "sweep/arena.yaml").hydra.sweeper.params
    assert params.experiment.split(",") == list(ARENA)
    assert {*params.algorithm.split(",")} == {*LOSSES} - {"dapo"}
    for algorithm in params.algorithm.split(","):
        alone = composed(f"algorithm={algorithm}").algorithm
        for experiment in ARENA:
            config = composed(f"experiment={experiment}", f"algorithm={algorithm}")
            alone.credit = config.task.credit  # which rewards there are is the task's
            assert config.algorithm == alone
