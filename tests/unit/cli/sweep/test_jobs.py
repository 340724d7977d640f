"""Names, states and locks of a sweep's jobs, and what a second start does with each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig

from support.lock_holders import locked_by_another
from vlmrl.cli.sweep.again import run_what_is_left
from vlmrl.cli.sweep.jobs import NAME_LENGTH, State, job_name, runs_in, state_of
from vlmrl.config.run import RunConfig
from vlmrl.errors import ConfigError
from vlmrl.record.lock import LOCK_FILE
from vlmrl.record.run_dir import RunDir

# ── names ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_job_is_its_overrides_in_any_order() -> None:
    one = job_name(["seed=1", "trainer.max_steps=2", "+sweep=seeds", "sweep.retry_failed=false"], "")
    other = job_name(["+sweep=other", "trainer.max_steps=2", "monitor.wandb.mode=disabled", "seed=1"], "")
    assert one == other == "seed=1,trainer.max_steps=2"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (["model.name=a/b"], ["model.name=a_b"]),
        (["model.name=" + "x" * 200 + "1"], ["model.name=" + "x" * 200 + "2"]),
        (["~model/vlm"], ["model/vlm=qwen3_vl"]),
        (["task.target=a.b:C"], ["task.target=a.b;C"]),
    ],
)
def test_other_overrides_are_another_job(one: list[str], other: list[str]) -> None:
    names = {job_name(one, ""), job_name(other, "")}
    assert len(names) == 2
    for name in names:
        assert "/" not in name
        assert len(name.encode()) <= NAME_LENGTH + 7


# ── states ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def run_dir(tmp_path: Path, run_config: Callable[..., RunConfig]) -> RunDir:
    """A run that was killed after it wrote its config."""
    run_dir = RunDir(tmp_path / "multirun/seed=1")
    run_dir.create()
    run_dir.write_config(run_config("seed=1"))
    return run_dir


SUMMARIES = {
    None: State.killed,
    "interrupted": State.stopped,
    "error": State.failed,
    "finished": State.finished,
    "target_reached": State.finished,
    "blind": State.finished,
}
"""Exit reason → state."""


def end(run_dir: RunDir, exit_reason: str | None) -> None:
    if exit_reason is not None:
        run_dir.write_summary({"exit_reason": exit_reason, "objective": 0.5, "error": "NonFiniteLossError: nan"})


@pytest.mark.parametrize(("exit_reason", "state"), SUMMARIES.items())
def test_state(exit_reason: str | None, state: State, run_dir: RunDir) -> None:
    end(run_dir, exit_reason)
    assert state_of(run_dir) is state
    with locked_by_another(run_dir.path):
        assert state_of(run_dir) is State.running
    assert state_of(run_dir) is state


def test_a_folder_without_a_config_is_new(tmp_path: Path) -> None:
    assert state_of(RunDir(tmp_path)) is State.new


# ── what is left ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("exit_reason", "retry_failed", "starts", "resumes"),
    [
        (None, True, True, True),
        ("interrupted", False, True, True),
        ("finished", True, False, False),
        ("target_reached", True, False, False),
        ("error", True, True, True),
        ("error", False, False, False),
    ],
)
def test_what_is_left(
    exit_reason: str | None,
    retry_failed: bool,
    starts: bool,
    resumes: bool,
    run_dir: RunDir,
    composed: Callable[..., DictConfig],
    capsys: pytest.CaptureFixture[str],
) -> None:
    end(run_dir, exit_reason)
    config = composed("seed=1", f"sweep.retry_failed={str(retry_failed).lower()}")
    config.output_dir = str(run_dir.path)
    started: list[DictConfig] = []

    def start(config: DictConfig) -> float:
        assert (run_dir.path / LOCK_FILE).exists(), "it is locked while it runs"
        started.append(config)
        return 0.75

    objective = run_what_is_left(config, ["seed=1"], start)
    said = capsys.readouterr().out
    assert len(started) == starts
    if starts:
        assert objective == 0.75
        assert started[0].resume == (str(run_dir.path) if resumes else None)
        assert run_dir.read_overrides() == ["seed=1"]
    elif exit_reason == "error":
        assert objective is None
        assert "NonFiniteLossError: nan" in said
    else:
        assert objective == 0.5, "of the first time: sweepers need it"
        assert "skipped" in said


def test_a_new_job_is_started_and_an_evaluation_is_done_again(
    tmp_path: Path, composed: Callable[..., DictConfig]
) -> None:
    config = composed()
    config.output_dir = str(tmp_path / "new")
    run_what_is_left(config, [], lambda config: None)
    assert config.resume is None
    config = composed("mode=eval")
    config.output_dir = str(tmp_path / "eval")
    RunDir(config.output_dir).create()
    RunDir(config.output_dir).config.touch()
    run_what_is_left(config, [], lambda config: None)
    assert config.resume is None, "there is no checkpoint of an evaluation"


def test_what_another_process_runs_is_left_to_it(run_dir: RunDir, composed: Callable[..., DictConfig]) -> None:
    config = composed()
    config.output_dir = str(run_dir.path)
    with locked_by_another(run_dir.path), pytest.raises(ConfigError, match="is in use by process"):
        run_what_is_left(config, [], lambda config: pytest.fail("started"))


# ── folders ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_runs_in(run_dir: RunDir) -> None:
    multirun = run_dir.path.parent
    (multirun / "seed=2").mkdir()
    (multirun / ".submitit").mkdir()
    (multirun / "multirun.yaml").touch()
    (multirun / "latest").symlink_to("seed=1")
    assert [run.name for run in runs_in(multirun)] == ["seed=1", "seed=2"], "one that has not begun counts"
    assert [run.path for run in runs_in(run_dir.path)] == [run_dir.path]
    with pytest.raises(ConfigError, match="neither a run nor a multirun"):
        runs_in(multirun / "seed=2")
