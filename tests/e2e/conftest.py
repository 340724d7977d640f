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


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """Where all commands run; what one builds in the cache serves the others."""
    path = tmp_path_factory.mktemp("home")
    shutil.copy(TESTS / "support/their_tasks.py", path)
    return Home(path)


@pytest.fixture(scope="session")
def finished(home: Home) -> tuple[Path, Ended]:
    """A short run of the default task that nothing disturbed, with its page; Weights & Biases gets checkpoints too."""
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
