"""The table of modes: which modes are runs, and where they record."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from vlmrl.config.run import Mode, RunConfig
from vlmrl.errors import ConfigError
from vlmrl.record.run_dir import RunDir
from vlmrl.runs.build import Progress
from vlmrl.runs.lifecycle import open_run_dir
from vlmrl.runs.modes import MODES, RunMode


def run_mode(mode: Mode) -> RunMode:
    row = MODES[mode]
    assert isinstance(row, RunMode)
    return row


def test_every_mode_has_a_row_or_is_answered_by_the_command_line() -> None:
    assert set(Mode) - set(MODES) == {Mode.check, Mode.compare, Mode.faults, Mode.play, Mode.preview, Mode.report}


def test_only_training_saves_and_its_checkpoints_are_named_after_its_steps() -> None:
    progress = Progress(policy_version=3, supervised_steps=5, evaluations=1)
    named = {
        mode: row.checkpoint_step(progress)
        for mode, row in MODES.items()
        if isinstance(row, RunMode) and row.checkpoint_step is not None
    }
    assert named == {Mode.rl: 3, Mode.sft: 5, Mode.dpo: 3}


def test_an_interrupted_run_says_how_to_go_on() -> None:
    warm_up = Progress(policy_version=0, supervised_steps=5, evaluations=0)
    remedy = "and saved: continue with python -m vlmrl resume=/runs/{a}"
    for mode in (Mode.rl, Mode.sft, Mode.dpo):
        said = run_mode(mode).interrupted.format(progress=warm_up, folder="/runs/{a}")
        assert said == f"stopped after supervised step 5 {remedy}"
    said = run_mode(Mode.rl).interrupted.format(progress=Progress(2, 5, 0), folder="/runs/{a}")
    assert said == f"stopped after step 2 {remedy}"
    for mode in (Mode.eval, Mode.serve, Mode.doctor, Mode.bench, Mode.replay):
        assert run_mode(mode).interrupted.format(progress=warm_up, folder="/runs").endswith(": start it again")


@pytest.fixture
def at(run_config: Callable[..., RunConfig], tmp_path: Path) -> Callable[..., RunConfig]:
    """A config whose run is in `tmp_path / "outputs/run"`."""

    def config(mode: Mode, *, resume: bool = False) -> RunConfig:
        folder = str(tmp_path / "outputs/run")
        return dataclasses.replace(run_config(), mode=mode, output_dir=folder, resume=folder if resume else None)

    return config


@pytest.mark.parametrize("mode", [Mode.rl, Mode.sft, Mode.eval, Mode.doctor, Mode.bench])
def test_a_new_run_writes_its_config_and_latest_points_at_it(mode: Mode, at: Callable[..., RunConfig]) -> None:
    run_dir = open_run_dir(at(mode), run_mode(mode))
    assert run_dir.read_config().mode == mode.name
    assert (run_dir.path.parent / "latest").resolve() == run_dir.path


def test_a_resumed_run_keeps_its_config_until_it_is_restored(at: Callable[..., RunConfig]) -> None:
    run_dir = open_run_dir(at(Mode.rl), run_mode(Mode.rl))
    run_dir.metrics.touch()
    with pytest.raises(ConfigError, match="already holds a run"):
        open_run_dir(at(Mode.rl), run_mode(Mode.rl))
    run_dir.config.unlink()
    assert open_run_dir(at(Mode.rl, resume=True), run_mode(Mode.rl)).path == run_dir.path
    assert not run_dir.config.exists()


def test_an_evaluation_of_a_past_run_records_into_a_folder_of_its_own(at: Callable[..., RunConfig]) -> None:
    run_dir = open_run_dir(at(Mode.rl), run_mode(Mode.rl))
    (run_dir.path.parent / "latest").unlink()
    before = run_dir.config.read_bytes()
    evaluated = open_run_dir(at(Mode.eval, resume=True), run_mode(Mode.eval))
    assert evaluated.path == run_dir.path / "eval"
    assert RunDir(evaluated.path).config.exists()
    assert run_dir.config.read_bytes() == before
    assert not (run_dir.path.parent / "latest").exists()


def test_a_replay_may_be_repeated_and_latest_does_not_point_at_it(at: Callable[..., RunConfig]) -> None:
    for _ in range(2):
        run_dir = open_run_dir(at(Mode.replay), run_mode(Mode.replay))
        run_dir.metrics.touch()
        assert run_dir.config.exists()
    assert not (run_dir.path.parent / "latest").exists()
