"""Fixtures of the tests that run the real command."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support import TESTS
from support.browser import opened_browser
from support.command_line import SHORT, Ended, Home


def a_home(tmp_path_factory: pytest.TempPathFactory, name: str) -> Home:
    """A folder with tasks of one's own; what a command builds in the cache serves those in other homes too."""
    path = tmp_path_factory.mktemp(name)
    shutil.copy(TESTS / "support/their_tasks.py", path)
    return Home(path, cache=tmp_path_factory.getbasetemp() / "cache")


@pytest.fixture(scope="module")
def home(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """Where the commands of a module run, so that no two modules give their runs one folder. It stays only where a test
    failed: all of them together take gigabytes."""
    failed = request.session.testsfailed
    made = a_home(tmp_path_factory, "home")
    yield made
    if request.session.testsfailed == failed:
        shutil.rmtree(made.path, ignore_errors=True)  # a process that a test has killed may still write


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    """A short run of the default task that nothing disturbed, with its page; Weights & Biases gets checkpoints too."""
    home = a_home(tmp_path_factory, "finished")
    run = home.path / "first/outputs/finished"
    wandb = ("monitor.wandb.mode=offline", "monitor.wandb.checkpoints=true")
    ended = home.vlmrl(*SHORT, *wandb, "monitor.report=true", f"hydra.run.dir={run}")
    assert ended.code == 0, ended.err
    return run, ended


@pytest.fixture(scope="session")
def never_stopped(finished: tuple[Path, Ended]) -> Path:
    """The folder of that run."""
    return finished[0]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A real Chromium; playwright's event loop ends with the module, so that other tests may have their own."""
    with opened_browser() as launched:
        yield launched
