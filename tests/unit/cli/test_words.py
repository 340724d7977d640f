"""Every spelling of `resume=`, `run=`, `step=`, `runs=` and `mode=`: read in the same way, or refused by name."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vlmrl.cli.main import main
from vlmrl.cli.words import folders_in, plain_words
from vlmrl.config.run import RunConfig
from vlmrl.errors import ConfigError
from vlmrl.record.run_dir import RunDir


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.chdir(tmp_path)


SPELLINGS = (
    "resume=outputs/none",
    "+resume=outputs/none",
    "++resume=outputs/none",
    "resume='outputs/none'",
    '++resume="outputs/none"',
    "resume= outputs/none ",
    "resume =outputs/none",
)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_resume_is_read_however_it_is_spelled(
    spelling: str, in_process: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main([spelling, "trainer.max_steps=1"]) == 2
    assert f"resume={tmp_path}/outputs/none holds no readable config.yaml" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [], "no run was started"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["++mode=replay", "+run='x'", 'step="1"'], "run={}/x holds no readable config.yaml"),
        (["mode=Mode.replay", "run=x", "step=1"], "run={}/x holds no readable config.yaml"),
        (["++mode=report", "++run=x"], "run={}/x holds no config.yaml of a run"),
        (["mode='report'", "runs='x'"], "{}/x is neither a run nor a multirun"),
        (["resume="], "resume= sets resume to nothing"),
        (["++resume=''"], "++resume='' sets resume to nothing"),
        (["resume=a", "--multirun"], "--multirun is not a value that a resumed run can change"),
        (["resume=a", "-m"], "-m is not a value that a resumed run can change"),
        (["resume=a,b", "hydra.mode=MULTIRUN"], "hydra.mode=MULTIRUN is not a value that a resumed run can change"),
        (["run=a=b"], "run=a=b has no effect with mode=rl"),
        (["mode=compare", "runs=[[a]]"], "runs=[[a]] holds something else than names of folders"),
        (["mode=report", "runs=[{a: 1}]"], "runs=[{a: 1}] holds something else than names of folders"),
        (["mode=compare", "runs=outputs"], "outputs is neither a run nor a multirun"),
    ],
)
def test_other_words(
    words: list[str], message: str, in_process: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(words) == 2
    err = capsys.readouterr().err
    assert message.replace("{}", str(tmp_path)) in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("key", "content", "message"),
    [
        ("experiment", "resume: outputs/a", "resume=outputs/a stands in a file of conf/"),
        ("experiment", "mode: replay\nrun: outputs/a\nstep: 1", "mode=replay run=outputs/a step=1 stands in a file"),
        ("experiment", "mode: report\nrun: outputs/a", "mode=report works on the command line only"),
        ("+sweep", "hydra: {mode: MULTIRUN, sweeper: {params: {resume: 'outputs/a,outputs/b'}}}", "resume=outputs/a"),
    ],
)
def test_words_in_a_file_are_refused(
    key: str,
    content: str,
    message: str,
    in_process: None,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """They would be composed into a new run, which trains from scratch."""
    group = key.lstrip("+")
    (tmp_path / "conf" / group).mkdir(parents=True)
    (tmp_path / f"conf/{group}/mine.yaml").write_text(f"# @package _global_\n{content}\n")
    assert main(["--config-dir", "conf", f"{key}=mine"]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["conf"]


def test_null_is_no_resume() -> None:
    assert plain_words(["resume=null", "++run=null", "runs=null", "seed=null"]) == ["runs=null", "seed=null"]
    with pytest.raises(ConfigError, match="mode=null sets mode to nothing"):
        plain_words(["mode=null"])


@pytest.mark.parametrize(
    ("value", "folders"),
    [
        ("outputs/a", ["outputs/a"]),
        ("[outputs/a,outputs/b]", ["outputs/a", "outputs/b"]),
        ("outputs/a, outputs/b", ["outputs/a", "outputs/b"]),
        ("['outputs/a b',\"c,d\"]", ["outputs/a b", "c,d"]),
        ("'c,d'", ["c,d"]),
        ("[a=1,日本]", ["a=1", "日本"]),
        ("[007,1e3,true]", ["007", "1e3", "true"]),
        ("there, is one", ["there, is one"]),
        ("[]", []),
    ],
)
def test_folders(value: str, folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there, is one").mkdir()
    assert folders_in(value) == folders


def test_report_and_compare_take_the_same_names(
    in_process: None, run_config: Callable[..., RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a, b", "c"):
        run_dir = RunDir(tmp_path / "it's" / name)
        run_dir.create()
        run_dir.write_config(run_config())
    for runs in ("it's", "[\"it's/a, b\",it's/c]"):
        assert main(["mode=report", f"runs={runs}"]) == 0, capsys.readouterr().err
        assert main(["mode=compare", f"runs={runs}", "hydra.run.dir=compared"]) == 0, capsys.readouterr().err
