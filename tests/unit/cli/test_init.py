"""`python -m vlmrl init`: what it writes, and what it refuses. tests/e2e/test_installed.py trains the result."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlmrl.cli.init import TEMPLATE, TEMPLATE_NAMES, init
from vlmrl.cli.main import main
from vlmrl.errors import ConfigError


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files(folder: Path) -> dict[str, str]:
    paths = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(folder).as_posix(): path.read_text() for path in paths}


def test_the_template_under_another_name(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "count_dots"]) == 0
    assert "python -m vlmrl.tasks.check count_dots:CountDots" in capsys.readouterr().out
    written = files(home / "count_dots")
    assert sorted(written) == ["README.md", "conf/experiment/count_dots.yaml", "count_dots.py", "test_count_dots.py"]
    assert "class CountDots(Task):" in written["count_dots.py"]
    assert "target: count_dots:CountDots" in written["conf/experiment/count_dots.yaml"]
    assert not [name for name, text in written.items() if "my_task" in text or "MyTask" in text]


def test_the_templates_own_name_is_copied_as_it_is(home: Path) -> None:
    init(["my_task"])
    assert files(home / "my_task") == {
        name: text for name, text in files(TEMPLATE).items() if "__pycache__" not in name
    }


def test_a_class_of_the_template_is_not_hidden(home: Path) -> None:
    init(["deep/disk"])
    assert "class DiskTask(Task):" in (home / "deep/disk/disk.py").read_text()
    source = (TEMPLATE / "my_task.py").read_text()
    assert all(name in source for name in TEMPLATE_NAMES)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "init takes exactly one name, and was given none"),
        (["a", "b"], "init takes exactly one name, and was given a b"),
        (["--help"], "init takes exactly one name"),
        (["my-task"], "'my-task' cannot be the name of a Python module: .* for example my_task"),
        (["2nd"], "'2nd' cannot be the name"),
        (["lambda"], "'lambda' cannot be the name"),
        (["größe"], "'größe' cannot be the name"),
        (["random"], "a Python module of the name random exists, .* for example random_task"),
        (["torch"], "a Python module of the name torch exists"),
        (["there"], "there exists and is not overwritten"),
    ],
)
def test_refused(words: list[str], message: str, home: Path) -> None:
    (home / "there").mkdir()
    with pytest.raises(ConfigError, match=message):
        init(words)
    assert [path.name for path in home.iterdir()] == ["there"], "nothing is written"
