from __future__ import annotations

import os
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from vlmrl.config.algorithm import AlgorithmConfig
from vlmrl.config.inference import EmbeddedConfig
from vlmrl.config.model import ModelConfig
from vlmrl.config.monitor import MonitorConfig, WandbMode
from vlmrl.config.orchestrator import OrchestratorConfig
from vlmrl.config.run import RunConfig
from vlmrl.config.task import ColorCodewordConfig
from vlmrl.config.trainer import TrainerConfig
from vlmrl.config.weight_sync import InProcessSyncConfig
from vlmrl.errors import ConfigError, VlmrlError
from vlmrl.record.run_dir import RunDir, git_state


def run_config(output_dir: Path) -> RunConfig:
    return RunConfig(
        output_dir=str(output_dir),
        model=ModelConfig(name="tiny"),
        task=ColorCodewordConfig(image_size=48),
        orchestrator=OrchestratorConfig(),
        algorithm=AlgorithmConfig(),
        inference=EmbeddedConfig(),
        trainer=TrainerConfig(),
        weight_sync=InProcessSyncConfig(),
        monitor=MonitorConfig(),
    )


def test_the_contract_of_names(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    names = {
        run_dir.config: "config.yaml",
        run_dir.metrics: "metrics.jsonl",
        run_dir.rollouts_file("step", 12): "rollouts/step_000012.parquet",
        run_dir.rollouts_file("eval", 12): "rollouts/eval_000012.parquet",
        run_dir.image("ab"): "images/ab.png",
        run_dir.checkpoint(20): "checkpoints/step_000020",
        run_dir.main_log: "logs/main.log",
        run_dir.summary: "summary.json",
    }
    assert {path: path.relative_to(tmp_path).as_posix() for path in names} == names


def test_a_relative_path_survives_a_change_of_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert RunDir("outputs/run").path == tmp_path / "outputs/run"


def test_checkpoints_are_found_by_step(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    assert run_dir.checkpoint_steps() == []
    for name in ("step_000020", "step_000005", "step_000030.tmp", ".step_000040", "step_²", "step_00000７"):
        (run_dir.checkpoints / name).mkdir(parents=True)
    assert run_dir.checkpoint_steps() == [5, 20]


def test_rollouts_of_later_steps(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.create()
    for kind, step in (("step", 9), ("step", 10), ("eval", 10), ("step", 11), ("eval", 20)):
        run_dir.rollouts_file("eval" if kind == "eval" else "step", step).touch()
    assert [path.name for path in run_dir.rollouts_after(10)] == ["eval_000020.parquet", "step_000011.parquet"]


def test_a_folder_that_cannot_be_written_is_refused_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    run_dir = RunDir(tmp_path / "file" / "run")
    with pytest.raises(
        ConfigError,
        match=r"^output_dir=.*/file/run cannot be written \(Not a directory\), so the run cannot be recorded: set",
    ):
        run_dir.create()


def test_a_folder_without_permission_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"output_dir=/proc/outputs cannot be written"):
        RunDir("/proc/outputs").create()


def test_two_runs_do_not_mix_in_one_folder(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "run")
    run_dir.create()
    run_dir.create()  # nothing was recorded yet
    run_dir.metrics.touch()
    with pytest.raises(ConfigError, match=r"already holds a run, .* or continue that run with resume="):
        run_dir.create()
    run_dir.create(resume=True)


# ── latest ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_latest_points_at_the_newest_run(tmp_path: Path) -> None:
    for name in ("2026-03-01/12-00-00_a", "2026-03-02/09-00-00_b"):
        run_dir = RunDir(tmp_path / "outputs" / name)
        run_dir.create()
        run_dir.point_latest()
    latest = tmp_path / "outputs/latest"
    assert latest.readlink() == Path("2026-03-02/09-00-00_b"), "relative: the folder may be moved"
    assert latest.resolve() == run_dir.path
    assert sorted(path.name for path in (tmp_path / "outputs").iterdir()) == ["2026-03-01", "2026-03-02", "latest"]


def test_a_file_called_latest_is_left_alone_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_dir = RunDir(tmp_path / "outputs/run")
    run_dir.create()
    (tmp_path / "outputs/latest").write_text("precious")
    run_dir.point_latest()
    assert (tmp_path / "outputs/latest").read_text() == "precious"
    assert "outputs/latest does not point to this run" in caplog.text


def test_only_our_names_are_files_of_rollouts(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.create()
    names = ("step_000001.parquet", "step_000012.parquet", "eval_000012.parquet")
    for name in (
        *names,
        "step_x_y.parquet",
        "step_².parquet",
        "eval_.parquet",
        "notes_000013.parquet",
        ".step_000014.parquet.tmp",
    ):
        (run_dir.rollouts / name).touch()
    assert (run_dir.rollouts_steps("step"), run_dir.rollouts_steps("eval")) == ([1, 12], [12])
    assert [path.name for path in run_dir.rollouts_after(1)] == ["eval_000012.parquet", "step_000012.parquet"]


def test_without_outputs_latest_stands_beside_the_run(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "runs/mine")
    run_dir.create()
    run_dir.point_latest()
    assert (tmp_path / "runs/latest").resolve() == run_dir.path


def test_a_folder_called_latest_is_left_alone_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "outputs/latest/precious").mkdir(parents=True)
    run_dir = RunDir(tmp_path / "outputs/run")
    run_dir.create()
    run_dir.point_latest()
    assert sorted(path.name for path in (tmp_path / "outputs").iterdir()) == ["latest", "run"]
    assert (tmp_path / "outputs/latest/precious").is_dir()
    assert "outputs/latest does not point to this run" in caplog.text


# ── config.yaml ─────────────────────────────────────────────────────────────────────────────────────────────


def test_config_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a-secret-of-mine")
    run_dir = RunDir(tmp_path)
    run_dir.write_config(run_config(tmp_path))
    text = run_dir.config.read_text()
    assert "a-secret-of-mine" not in text
    whole = OmegaConf.load(run_dir.config)
    assert whole.task.image_size == 48
    assert whole.monitor.wandb.mode == "auto"
    assert set(whole.environment) == {"python", "platform", "packages", "git"}
    assert set(whole.environment.packages) == {"vlmrl", "torch", "transformers", "renderers", "hydra-core", "numpy"}
    assert whole.environment.packages["numpy"].count(".") >= 1


def test_the_config_comes_back_equal(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    made = run_config(tmp_path)
    run_dir.write_config(made)
    schema = OmegaConf.structured(RunConfig)
    schema.task = OmegaConf.structured(ColorCodewordConfig)
    schema.inference = OmegaConf.structured(EmbeddedConfig)
    back = OmegaConf.to_object(OmegaConf.merge(schema, run_dir.read_config()))
    assert OmegaConf.structured(back) == OmegaConf.structured(made)  # tuples are lists to OmegaConf
    assert isinstance(back, RunConfig)
    assert back.monitor.wandb.mode is WandbMode.auto


BOMB = "a: &a [lol]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in pairwise("abcdefghi")
)
"""9 to the 8th values in a few lines."""
CONFIGS: dict[str, bytes | None] = {
    "absent": None,
    "not YAML": b"a: [",
    "a list": b"- 1\n- 2\n",
    "a number": b"5",
    "empty interpolation": b"a: ${\n",
    "an alias bomb": BOMB.encode(),
    "deep": b"[" * 50_000,
    "not UTF-8": b"a: \xff\xfe",
    "NULs": b"\0" * 100,
    "a tag": b"a: !!python/object/apply:os.system [id]",
    "a key that is a list": b"? [a]\n: 1",
}
"""Contents that no run writes."""


@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_without_a_config_is_no_run(name: str, tmp_path: Path) -> None:
    if (content := CONFIGS[name]) is not None:
        (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"(?s)^resume={tmp_path}.*: name the folder of a run"):
        RunDir(tmp_path).read_config()


def test_a_named_pipe_is_no_config(tmp_path: Path) -> None:
    """Its reading would wait for a writer for ever."""
    os.mkfifo(tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match="it is not a regular file"):
        RunDir(tmp_path).read_config()


def test_git_state_of_a_checkout(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    git("init")
    package = tmp_path / "package"
    package.mkdir()
    (package / "module.py").write_text("x = 1\n")
    assert git_state(package) is None, "a checkout that does not track the folder says nothing about it"
    git("add", ".")
    git("commit", "-m", "first")
    state = git_state(package)
    assert state is not None
    assert (len(state["commit"]), state["dirty"]) == (40, False)
    (package / "module.py").write_text("x = 2\n")
    assert git_state(package) == {"commit": state["commit"], "dirty": True}


def test_without_git_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(Path(__file__).parent) is None


# ── summary.json ────────────────────────────────────────────────────────────────────────────────────────────


def test_summary_comes_back(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    assert run_dir.read_summary() is None
    run_dir.write_summary({"exit_reason": "finished", "loss": float("nan")})
    assert run_dir.read_summary() == {"exit_reason": "finished", "loss": None}


@pytest.mark.parametrize(
    "content",
    ["", "\0\0", "[]", "null", "{}", '{"exit_reason":1}', '{"exit_reason":"error","wall_clock_s":"long"}', "[" * 3000],
)
def test_a_damaged_summary_counts_as_none_and_is_reported(content: str, tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "summary.json").write_text(content)
    assert RunDir(tmp_path).read_summary(said.append) is None
    assert said[0].startswith(f"{tmp_path}/summary.json is damaged and is ignored: ")


def test_damaged_overrides_count_as_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for content in ("", "{}", "[1]"):
        (tmp_path / "overrides.json").write_text(content)
        assert RunDir(tmp_path).read_overrides() is None
    assert caplog.text.count("overrides.json is damaged") == 3


def test_a_summary_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(VlmrlError, match=r"gone/summary\.json cannot be written"):
        RunDir(tmp_path / "gone").write_summary({})
