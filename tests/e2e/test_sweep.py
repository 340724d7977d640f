"""Sweeps with the real command: killed and started again, and with launchers and sweepers of other packages."""

from __future__ import annotations

import csv
import importlib.util
import json
from pathlib import Path

import pytest

from support.command_line import KILL_AT, PATIENCE, SHORT, Home, Scenarios, assert_same_run
from support.processes import start
from vlmrl.cli.sweep.jobs import job_name

pytestmark = pytest.mark.slow

QUICKER = (
    "trainer.warmup.steps=1",
    "trainer.warmup.learning_rate=0.005",  # as Hydra writes it, which a job's name is made of
    "trainer.max_steps=4",
    "orchestrator.eval.problems=2",
    "orchestrator.eval.every=4",
)
QUICK = tuple({override.partition("=")[0]: override for override in (*SHORT, *QUICKER)}.values())
"""Overrides of a job that takes about a second. Each key appears once, because Hydra names jobs by them."""


def table(folder: Path) -> list[dict[str, str]]:
    """compare.csv."""
    with (folder / "compare.csv").open() as file:
        return list(csv.DictReader(file))


def needs(module: str) -> pytest.MarkDecorator:
    """Skip the test if an extra is not installed. The check imports nothing."""
    package = module.partition(".")[0]  # find_spec raises where it is not there either
    found = importlib.util.find_spec(package) and importlib.util.find_spec(module)
    return pytest.mark.skipif(found is None, reason=f"{module} is not installed")


# ── killed, and run again ───────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def sweeps(home: Home) -> Scenarios:
    """All runs of this module, started side by side."""

    def killed_after_three() -> tuple[Path, list[str], list[str]]:
        """A sweep of six jobs, killed before the fourth has its folder, then started again."""
        folder = home.path / "outputs/multirun/six"
        arguments = ("--multirun", "seed=0,1,2,3,4,5", *QUICK, f"hydra.sweep.dir={folder}")
        killed = home.vlmrl("os.mkdir", job_name(["seed=3", *QUICK], ""), *arguments, code=("-c", KILL_AT))
        assert killed.code == -9, killed.err
        before = sorted(path.parent.name for path in folder.glob("*/summary.json"))
        again = home.vlmrl(*arguments)
        assert again.code == 0, again.err
        ran = [line for line in again.out.splitlines() if line.startswith("run ") or "skipped" in line]
        return folder, before, ran

    def killed_at_work() -> tuple[Path, Path]:
        """A sweep killed in its second job and started again; and the same job, never stopped."""
        folder, alone = home.path / "outputs/multirun/two", home.path / "outputs/alone"
        arguments = ("--multirun", "seed=7,8", *QUICK, f"hydra.sweep.dir={folder}")
        name = job_name(["seed=8", *QUICK], "")
        killed = home.vlmrl("os.rename", f"{name}/checkpoints/partial_000004", *arguments, code=("-c", KILL_AT))
        assert killed.code == -9, killed.err
        again = home.vlmrl(*arguments)
        assert again.code == 0, again.err
        assert f"{name}: continues, it was killed before" in again.out
        assert home.vlmrl("seed=8", *QUICK, f"hydra.run.dir={alone}").code == 0
        return folder / name, alone

    return Scenarios(killed_after_three=killed_after_three, killed_at_work=killed_at_work)


def test_killed_after_three_of_six_exactly_three_run(sweeps: Scenarios) -> None:
    _, before, ran = sweeps["killed_after_three"]
    jobs = [job_name([f"seed={seed}", *QUICK], "") for seed in range(6)]
    assert before == sorted(jobs[:3])
    assert ran == [f"{job}: skipped, it has finished before" for job in jobs[:3]] + [f"run {job}" for job in jobs[3:]]


def test_the_table_is_whole(sweeps: Scenarios) -> None:
    folder = sweeps["killed_after_three"][0]
    rows = table(folder)
    assert [row["job"] for row in rows] == [f"seed={seed}" for seed in range(6)]
    for row in rows:
        assert (row["state"], row["step"]) == ("finished", "4")
        for figure in ("eval/reward", "reward/mean", "seconds", "throughput/tokens_per_s", "mismatch_kl/max"):
            assert float(row[figure]) >= 0, figure
    for name in ("compare.txt", "compare.png", "compare.html"):
        assert (folder / name).stat().st_size > 0


def test_an_interrupted_job_goes_on_from_its_checkpoint(sweeps: Scenarios) -> None:
    assert_same_run(*sweeps["killed_at_work"])


def test_compare_at_any_time(sweeps: Scenarios, home: Home) -> None:
    """A comparison of unrelated folders is written into a folder of its own."""
    folder, alone = sweeps["killed_after_three"][0], sweeps["killed_at_work"][1]
    into = home.path / "outputs/compared"
    ended = home.vlmrl("mode=compare", f"runs=[{folder},{alone}]", f"hydra.run.dir={into}")
    assert ended.code == 0, ended.err
    assert [row["state"] for row in table(into)] == ["finished"] * 7
    assert ended.out.startswith((into / "compare.txt").read_text())
    again = home.vlmrl("mode=compare", f"runs=[{folder}]", f"hydra.run.dir={home.path / 'outputs/not_needed'}")
    assert again.code == 0, again.err
    assert again.out.startswith((folder / "compare.txt").read_text())
    assert not (home.path / "outputs/not_needed").exists(), "a multirun keeps its own table"


def test_a_job_that_cannot_run_keeps_the_others_from_being_started(home: Home) -> None:
    folder = home.path / "outputs/multirun/refused"
    ended = home.vlmrl("--multirun", *QUICK, "orchestrator.group_size=4,1", f"hydra.sweep.dir={folder}")
    assert ended.code == 2
    assert "orchestrator.group_size=1 " in ended.err
    assert "set orchestrator.group_size=2 or more" in ended.err
    assert not folder.exists()


# ── launchers and sweepers of other packages ────────────────────────────────────────────────────────────────


@needs("hydra_plugins.hydra_joblib_launcher")
def test_parallel_jobs_on_one_machine(home: Home) -> None:
    folder = home.path / "outputs/multirun/parallel"
    arguments = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2", f"hydra.sweep.dir={folder}")
    ended = home.vlmrl("--multirun", "seed=0,1", *QUICK, *arguments)
    assert ended.code == 0, ended.err
    assert [(row["job"], row["state"]) for row in table(folder)] == [("seed=0", "finished"), ("seed=1", "finished")]


@needs("hydra_plugins.hydra_optuna_sweeper")
def test_a_search_by_optuna(home: Home) -> None:
    folder = home.path / "outputs/multirun/search"
    quick = [override for override in QUICK if "group_size" not in override]
    arguments = ("+sweep=optuna", "hydra.sweeper.n_trials=3", *quick, f"hydra.sweep.dir={folder}")
    ended = home.vlmrl(*arguments)
    assert ended.code == 0, ended.err
    rows = table(folder)
    assert [row["state"] for row in rows] == ["finished"] * 3
    best = max(json.loads(path.read_text())["objective"] for path in folder.glob("*/summary.json"))
    result = (folder / "optimization_results.yaml").read_text()
    assert f"best_value: {best}" in result
    again = home.vlmrl(*arguments)
    assert again.code == 0, again.err
    assert again.out.count("skipped, it has finished before") == 3, "the same trials are proposed"
    assert (folder / "optimization_results.yaml").read_text() == result


@needs("hydra_plugins.hydra_submitit_launcher")
@pytest.mark.parametrize("has_programs", [False, True])
def test_a_launcher_that_finds_no_queue(has_programs: bool, home: Home, tmp_path: Path) -> None:
    """Without Slurm's programs, and with them where its controller does not answer."""
    for name in ("srun", "sbatch") if has_programs else ():
        (tmp_path / name).write_text("#!/bin/sh\necho Unable to contact slurm controller >&2\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    arguments = ("seed=0,1", *SHORT, "hydra/launcher=slurm", f"hydra.sweep.dir={tmp_path / 'no_queue'}")
    without_slurm = {**home.environment, "PATH": str(tmp_path)}
    process = start("-m", "vlmrl", *arguments, cwd=home.path, environment=without_slurm)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert "Traceback" not in err
    error = next(line for line in err.splitlines() if line.startswith("error: "))
    assert error.startswith("error: the launcher cannot start the jobs (")
    assert ("Unable to contact slurm controller" if has_programs else "srun") in error
