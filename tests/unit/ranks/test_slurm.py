"""The role of a Slurm task, from its environment. tests/e2e/test_slurm.py runs a real Slurm."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from vlmrl.cli.hydra_job import submission_of
from vlmrl.config.run import RunConfig
from vlmrl.errors import ConfigError, EngineError, VlmrlError
from vlmrl.inference.vllm.slurm_servers import Announced, announce, announcement, find_servers
from vlmrl.preflight.check import Stage, check
from vlmrl.preflight.rules.slurm import weights_cross_nodes
from vlmrl.preflight.site import Site
from vlmrl.ranks import slurm
from vlmrl.ranks.place import Place, find_place

SERVES = ("inference=vllm", "inference.slurm_tasks=1")


def step(task: int, tasks: int = 3, **more: str) -> dict[str, str]:
    """The environment of task number `task` of a step."""
    number = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NODELIST": "here"}
    return number | {"SLURM_STEP_NUM_TASKS": str(tasks), "SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)} | more


@pytest.fixture
def in_task(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`in_task(1, tasks=3)`: this process is task 1 of 3. `serving` tasks run servers; None: not divided yet."""

    def enter(task: int, tasks: int = 3, serving: int | None = None, **more: str) -> None:
        monkeypatch.setattr(slurm, "_serving", serving)
        for name, value in step(task, tasks, **more).items():
            monkeypatch.setenv(name, value)

    return enter


# ── who serves ──────────────────────────────────────────────────────────────────────────────────────────────


def test_ranks_are_those_that_do_not_serve(in_task: Callable[..., None]) -> None:
    in_task(0, serving=1)
    assert [slurm.server_index(step(task)) for task in range(3)] == [None, None, 0]
    places = [find_place(step(task)) for task in (0, 1)]
    assert [(place.rank, place.size) for place in places] == [(0, 2), (1, 2)]
    assert find_place(step(0, tasks=2)) == Place(), "a single training task is a run of one process"


def test_tasks_are_divided_once(in_task: Callable[..., None]) -> None:
    in_task(2)
    slurm.divide_tasks(1)
    assert slurm.server_index() == 0
    slurm.divide_tasks(1)
    with pytest.raises(ConfigError, match=r"inference\.slurm_tasks=2 is not on the command line.*\(1 run servers"):
        slurm.divide_tasks(2)


def test_one_task_must_train(in_task: Callable[..., None]) -> None:
    in_task(0)
    with pytest.raises(ConfigError, match="takes all 3 tasks of this step"):
        slurm.divide_tasks(3)


def test_no_task_serves_outside_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_STEP_ID", raising=False)
    slurm.divide_tasks(0)
    with pytest.raises(ConfigError, match="this process is not in a step"):
        slurm.divide_tasks(1)


# ── what is refused before it is submitted ──────────────────────────────────────────────────────────────────


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
        (
            {"nodes": 1, "tasks_per_node": 3},
            ("inference=embedded",),
            "trainer.sharding=.* inference=embedded, which .* set trainer.sharding=none",
        ),
        (
            {"nodes": 1, "tasks_per_node": 2},
            ("inference=embedded", "trainer.sharding=optimizer"),
            "trainer.sharding=.* inference=embedded, which .* set trainer.sharding=none",
        ),
        ({"nodes": 1, "tasks_per_node": 2}, ("inference=embedded", "trainer.sharding=none"), None),
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


# ── finding each other ──────────────────────────────────────────────────────────────────────────────────────


def test_an_announcement_is_for_this_life_and_this_user(in_task: Callable[..., None], tmp_path: Path) -> None:
    in_task(1, tasks=2, serving=1, SLURM_RESTART_COUNT="1")
    announce(tmp_path / "servers/7.0.0.0.json", url="http://old", key="old")
    said: list[str] = []

    async def both() -> list[Announced]:
        finding = asyncio.create_task(find_servers(tmp_path, 60.0, said.append))
        while not said:
            await asyncio.sleep(0)
        announce(announcement(tmp_path, 0), url="http://here:1", key="secret")
        return await finding

    assert asyncio.run(both()) == [Announced("http://here:1", "secret")]
    assert stat.S_IMODE(announcement(tmp_path, 0).stat().st_mode) == 0o600
    announce(announcement(tmp_path, 0), error="vLLM server 0 ended")
    with pytest.raises(EngineError, match="vLLM server 0 ended"):
        asyncio.run(find_servers(tmp_path, 60.0, said.append))


def test_a_server_that_does_not_come(in_task: Callable[..., None], tmp_path: Path) -> None:
    in_task(0, tasks=2, serving=1)
    with pytest.raises(EngineError, match="1 of 1 servers were not up within"):
        asyncio.run(find_servers(tmp_path, 0.0, lambda line: None))


@pytest.mark.parametrize("ends", ["by itself", "killed"])
def test_servers_end_with_task_0(ends: str, in_task: Callable[..., None]) -> None:
    hold = (
        "import sys; from vlmrl.ranks import slurm\n"
        "slurm.divide_tasks(1)\n"
        "with slurm.holding_servers(): print('held', flush=True); sys.stdin.readline()"
    )
    number = os.getpid()  # tests of two sessions do not meet
    leader = {**os.environ, **step(0, tasks=2), "SLURM_JOB_ID": str(number)}
    in_task(1, tasks=2, serving=1, SLURM_JOB_ID=str(number))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", hold], env=leader, **pipes) as task_0:  # type: ignore[call-overload]
        assert task_0.stdout.readline() == "held\n"

        async def serve() -> None:
            over = asyncio.create_task(slurm.run_is_over())
            done, _ = await asyncio.wait({over}, timeout=0.5)
            assert not done, "it serves for as long as the run lasts"
            if ends == "killed":
                task_0.send_signal(signal.SIGKILL)
            else:
                task_0.stdin.write("\n")
                task_0.stdin.flush()
            await asyncio.wait_for(over, 30.0)

        asyncio.run(serve())


def test_task_0_that_was_never_there(in_task: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    in_task(1, tasks=2)
    with socket.create_server(("127.0.0.1", 0)) as free:
        monkeypatch.setattr(slurm, "FIRST_PORT", free.getsockname()[1])
    monkeypatch.setattr(slurm, "PORT_COUNT", 1)
    monkeypatch.setattr(slurm, "CONNECT_TIMEOUT_S", 0.0)
    with pytest.raises(VlmrlError, match="task 0 of this step did not answer at"):
        asyncio.run(slurm.run_is_over())


# ── back into the queue ─────────────────────────────────────────────────────────────────────────────────────


def test_submitit_has_the_last_word_about_the_queue() -> None:
    called: list[int] = []
    slurm.requeue(signal.SIGUSR2, lambda number, frame: called.append(number))
    assert called == [signal.SIGUSR2]

    def too_often(number: int, frame: object) -> None:
        raise RuntimeError("Job not requeued because: timed-out too many times.")

    with pytest.raises(VlmrlError, match="too many times"):
        slurm.requeue(signal.SIGUSR2, too_often)
