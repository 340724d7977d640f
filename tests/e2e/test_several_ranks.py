"""Real runs of several ranks: the same figures as one process, whatever ends them, and with whatever they go on."""

from __future__ import annotations

import signal
import socket
import time
from pathlib import Path

import psutil
import pytest

from support.command_line import PATIENCE, SHORT, Ended, Gate, Home, Scenarios, steady, summary
from support.processes import Process

pytestmark = pytest.mark.slow

TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "vlmrl")
REPLICATED = "trainer.sharding=none"
"""A copy of the weights on each rank; by default they are sliced. Both sample on all ranks."""
STEP_4 = 6
"""A problem of the fourth step: two groups a step."""
DIVIDED = ("tokens/packed", "micro_batches", "images/", "memory/", "time/", "env/", "throughput/", "inference/")
"""What depends on how a batch is divided."""


def in_ranks(home: Home, *arguments: str) -> Process:
    """Two ranks, under torchrun; a port of their own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = (*TORCHRUN[:2], f"--master-port={port}", *TORCHRUN[2:])
    return home.start(*arguments, code=code, new_session=True)


def ended(process: Process) -> Ended:
    started = time.monotonic()
    out, err = process.communicate(timeout=PATIENCE)
    return Ended(process.returncode, out, err, time.monotonic() - started)


def ranks_of(process: Process) -> dict[int, psutil.Process]:
    """Rank → process, of a run under torchrun that is at work; both were told their ranks at their start."""
    children = psutil.Process(process.pid).children()
    return {int(child.environ()["RANK"]): child for child in children if "RANK" in child.environ()}


@pytest.fixture(scope="module")
def ends(home: Home, never_stopped: Path) -> Scenarios:
    """Everything of this module that starts processes."""

    def interrupted() -> tuple[Path, Ended, Ended]:
        """SIGTERM to torchrun in step 4, then on with one process."""
        run, gate = home.path / "outputs/ranks_interrupted", Gate(home.path / "gates/ranks_interrupted")
        first = in_ranks(home, *SHORT, *gate.arguments(STEP_4), f"hydra.run.dir={run}")
        gate.wait(lambda: first.poll() is None)
        first.send_signal(signal.SIGTERM)
        stopped = ended(first)
        return run, stopped, home.vlmrl(f"resume={run}", "task.args.hold=-1")

    def killed(rank: int) -> tuple[Path, Ended, list[psutil.Process]]:
        """SIGKILL to one of the ranks in step 4."""
        run, gate = home.path / f"outputs/rank_{rank}_killed", Gate(home.path / f"gates/rank_{rank}_killed")
        process = in_ranks(home, *SHORT, REPLICATED, *gate.arguments(STEP_4), f"hydra.run.dir={run}")
        gate.wait(lambda: process.poll() is None)
        ranks = ranks_of(process)
        ranks[rank].kill()
        return run, ended(process), list(psutil.wait_procs(ranks.values(), timeout=30)[1])

    def refused() -> list[Ended]:
        """Configurations that ranks cannot run, and one that no run can."""
        return [ended(in_ranks(home, *arguments)) for arguments in (("mode=doctor",), ("trainer.lr=1",))]

    return Scenarios(interrupted=interrupted, killed_1=lambda: killed(1), killed_0=lambda: killed(0), refused=refused)


def test_stopped_and_continued_by_one_process(ends: Scenarios, never_stopped: Path) -> None:
    run, stopped, alone = ends["interrupted"]
    assert f"interrupted: stopped after step 3 and saved: continue with python -m vlmrl resume={run}" in stopped.err
    assert (alone.code, alone.err) == (0, "")
    found, wanted = (steady(folder / "metrics.jsonl") for folder in (run, never_stopped))
    assert [line["step"] for line in found] == [line["step"] for line in wanted] == list(range(7))
    for mine, theirs in zip(found, wanted, strict=True):
        for key, value in theirs.items():
            if not key.removeprefix("eval/").startswith(DIVIDED):
                assert mine[key] == pytest.approx(value, rel=1e-3, abs=1e-4), f"{key} of step {mine['step']}"
    assert (run / "logs/rank_1.log").read_text().count("rank 1 of 2 is process") == 1


def test_a_rank_that_is_killed_ends_the_run_with_its_reason(ends: Scenarios) -> None:
    run, ended, left = ends["killed_1"]
    assert ended.code != 0
    assert "error: rank 1 (process " in ended.err
    assert "has ended: it was killed, or its host is gone" in ended.err
    assert summary(run)["exit_reason"] == "error"
    assert summary(run)["error"].startswith("RankError: rank 1 (process ")
    assert left == []


def test_no_rank_outlives_rank_0(ends: Scenarios) -> None:
    run, ended, left = ends["killed_0"]
    assert ended.code != 0
    assert not (run / "summary.json").exists()
    assert left == []


def test_what_ranks_cannot_run_is_refused_and_all_of_them_end(ends: Scenarios) -> None:
    alone, unknown = ends["refused"]
    assert alone.code != 0
    assert "error: mode=doctor runs in one process, so 2 ranks would all do the same work" in alone.err
    assert unknown.code != 0
    assert "trainer.lr: there is no such key" in unknown.err
