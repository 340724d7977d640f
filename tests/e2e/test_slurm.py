"""A real Slurm (tests/support/start_slurm.sh): jobs by sbatch and by
hydra/launcher=slurm, put back into the queue, of several tasks."""

from __future__ import annotations

import csv
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from support.command_line import PATIENCE, REPOSITORY, SHORT, Gate, Home, assert_same_run, summary, until
from vlmrl.inference.vllm.server import vllm_version
from vlmrl.record.metrics import read_metrics

STEP_4 = 6
"""A problem of the fourth RL step of `SHORT`, between the checkpoints of steps 2 and 4."""


def slurm_runs() -> bool:
    return shutil.which("sinfo") is not None and subprocess.run(["sinfo"], capture_output=True).returncode == 0


pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.skipif(not slurm_runs(), reason="no Slurm runs here"),
    pytest.mark.skipif(find_spec("submitit") is None, reason="its launcher is not installed: '.[test,slurm]'"),
]


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """A folder that all jobs run in, with the tasks of a user's own."""
    path = tmp_path_factory.mktemp("slurm")
    shutil.copy(REPOSITORY / "tests/support/their_tasks.py", path)
    return Home(path)


@pytest.fixture(scope="session")
def never_stopped(home: Home) -> Path:
    """What `SHORT` comes to where nobody disturbs it; no Slurm in it."""
    run = home.path / "outputs/never_stopped"
    ended = home.vlmrl(*SHORT, "task=their_tasks:Gated", "task.max_turns=2", "task.credit=turn", f"hydra.run.dir={run}")
    assert ended.code == 0, ended.err
    return run


def sbatch(home: Home, command: str, *options: str) -> str:
    """Submit `command` → the job's number."""
    script = home.path / "job.sh"
    script.write_text(f"#!/bin/bash\n{command}\n")
    said = call(
        home, "sbatch", "--parsable", f"--output={home.path}/job_%j.log", "--open-mode=append", *options, script
    )
    return said.strip()


def call(home: Home, *command: str | Path) -> str:
    ended = subprocess.run(command, cwd=home.path, env=home.environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def state(job: str) -> str:
    """`COMPLETED`, `PENDING`, …"""
    said = subprocess.run(["scontrol", "--oneliner", "show", "job", job], capture_output=True, text=True, check=True)
    return said.stdout.partition("JobState=")[2].split()[0]


def wait_for(what: Callable[[], bool]) -> None:
    until(what, "Slurm comes to it", pause_s=0.1)


def log(home: Home, job: str) -> str:
    return (home.path / f"job_{job}.log").read_text()


def vlmrl(*arguments: str) -> str:
    """The command as a batch script has it."""
    return shlex.join(["srun", sys.executable, "-m", "vlmrl", *arguments])


# ── by sbatch ───────────────────────────────────────────────────────────────────────────────────────────────


def test_a_run_by_sbatch(home: Home) -> None:
    job = sbatch(home, vlmrl(*SHORT), "--wait")
    assert state(job) == "COMPLETED", log(home, job)
    (run,) = (home.path / "outputs/slurm").glob(f"{job}.0_*")
    assert summary(run)["exit_reason"] == "finished"
    assert (home.path / "outputs/latest").resolve() == run.resolve()


@pytest.mark.parametrize("how", ["requeue", "signal"])
def test_a_job_that_is_put_back_into_the_queue_resumes(how: str, home: Home, never_stopped: Path) -> None:
    """Cancelled and requeued by Slurm, or told by a signal that its time is over: it saves, and goes on by itself."""
    gate = Gate(home.path / f"gates/{how}")
    job = sbatch(home, vlmrl(*SHORT, *gate.arguments(STEP_4)), "--requeue")
    gate.wait(lambda: state(job) in ("PENDING", "RUNNING", "CONFIGURING"))
    call(home, *(["scontrol", "requeue", job] if how == "requeue" else ["scancel", "--signal=USR1", job]))
    wait_for(lambda: "stopped after step 3 and saved" in log(home, job))
    gate.open()
    wait_for(lambda: state(job) == "COMPLETED")
    (run,) = (home.path / "outputs/slurm").glob(f"{job}.0_*")
    assert f"{run.name}: continues, it was stopped before" in log(home, job)
    assert_same_run(run, never_stopped)


# ── by the launcher ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_sweep_of_four(home: Home) -> None:
    folder = home.path / "outputs/multirun/four"
    arguments = ("seed=0,1,2,3", *SHORT, "hydra/launcher=slurm", f"hydra.sweep.dir={folder}")
    ended = home.vlmrl(*arguments)
    assert ended.code == 0, ended.err
    with (folder / "compare.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["job"], row["state"]) for row in rows] == [(f"seed={seed}", "finished") for seed in range(4)]
    assert len(list((folder / ".submitit").glob("*_[0123]/*_result.pkl"))) == 4, "each was a job of its own"


def test_nothing_is_submitted_that_cannot_run(home: Home) -> None:
    folder = home.path / "outputs/multirun/refused"
    ended = home.vlmrl("orchestrator.group_size=4,1", "hydra/launcher=slurm", f"hydra.sweep.dir={folder}")
    assert ended.code == 2
    assert "set orchestrator.group_size=2 or more" in ended.err
    assert not folder.exists()


def test_a_job_of_the_launcher_that_is_out_of_time_resumes(home: Home, never_stopped: Path) -> None:
    """submitit has the signal after the run has saved, and puts the job back into the queue."""
    gate, folder = Gate(home.path / "gates/launcher"), home.path / "outputs/multirun/out_of_time"
    launched = home.start(
        *SHORT,
        *gate.arguments(STEP_4),
        "hydra/launcher=slurm",
        "hydra.launcher.name=timed",
        f"hydra.sweep.dir={folder}",
    )
    gate.wait(lambda: launched.poll() is None)
    job = call(home, "squeue", "--noheader", "--name=timed", "--format=%i").strip()
    call(home, "scancel", "--signal=USR2", job)
    (errors,) = folder.glob(".submitit/*/*_log.err")
    wait_for(lambda: "Requeued job" in errors.read_text())
    gate.open()
    _, err = launched.communicate(timeout=PATIENCE)
    assert launched.returncode == 0, err
    (metrics,) = folder.glob("*/metrics.jsonl")
    (out,) = folder.glob(".submitit/*/*_log.out")
    assert "continues, it was stopped before" in out.read_text()
    assert_same_run(metrics.parent, never_stopped)


# ── several tasks ───────────────────────────────────────────────────────────────────────────────────────────


def test_two_tasks_train_together(home: Home) -> None:
    """The launcher's tasks are one trainer; told that their time is over, they save, and go on together."""
    gate, folder = Gate(home.path / "gates/together"), home.path / "outputs/multirun/together"
    launcher = ("hydra/launcher=slurm", "hydra.launcher.name=together", "hydra.launcher.tasks_per_node=2")
    choices = (*SHORT, *gate.arguments(STEP_4))
    launched = home.start(*choices, *launcher, f"hydra.sweep.dir={folder}")
    gate.wait(lambda: launched.poll() is None)
    job = call(home, "squeue", "--noheader", "--name=together", "--format=%i").strip()
    call(home, "scancel", "--signal=USR2", job)
    errors = folder / f".submitit/{job}/{job}_0_log.err"
    wait_for(lambda: "Requeued job" in errors.read_text())
    gate.open()
    _, err = launched.communicate(timeout=PATIENCE)
    assert launched.returncode == 0, err
    (run,) = (path.parent for path in folder.glob("*/metrics.jsonl"))
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl")] == list(range(7))
    assert summary(run)["exit_reason"] == "finished"
    out = (folder / f".submitit/{job}/{job}_0_log.out").read_text()
    assert out.count(", 2 ranks") == 2
    assert "continues, it was stopped before" in out


@pytest.mark.vllm
@pytest.mark.skipif(vllm_version() is None, reason="no vLLM")
def test_two_tasks_train_and_one_serves(home: Home) -> None:
    """The last task is a vLLM server, the others are a trainer of two ranks; all end with the run."""
    job = sbatch(home, vlmrl(*SHORT, "inference=vllm", "inference.slurm_tasks=1"), "--ntasks=3", "--wait")
    assert state(job) == "COMPLETED", log(home, job)
    assert ", 2 ranks" in log(home, job)
    (run,) = (home.path / "outputs/slurm").glob(f"{job}.0_*")
    assert summary(run)["exit_reason"] == "finished"
    steps = [line for line in read_metrics(run / "metrics.jsonl") if line["step"] > 0]
    assert sum(line["inference/requests"] for line in steps) > 0
    assert max(line["mismatch_kl/max"] for line in steps) < 1e-6
    assert (run / "logs/vllm_0.log").exists()
    assert list((run / "servers").iterdir()) == [], "the server's key is gone with it"
