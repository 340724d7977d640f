"""Two processes run the whole suite; everything else runs in one (tests/conftest.py)."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest

from support import TESTS

DEFAULT = "not documentation and not benchmark"


def chosen(**options: Any) -> Any:
    """What the hook makes of the options of a plain `pytest`, changed by `options`."""
    spec = importlib.util.spec_from_file_location("conftest_of_the_suite", TESTS / "conftest.py")
    assert spec is not None
    assert spec.loader is not None
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    source = options.pop("source", pytest.Config.ArgsSource.TESTPATHS)
    plain = {"keyword": "", "markexpr": DEFAULT, "usepdb": False, "numprocesses": None, "dist": "no"}
    option = SimpleNamespace(**{**plain, **options})
    conftest.pytest_cmdline_main(SimpleNamespace(option=option, args_source=source, getini=lambda _: ["-m", DEFAULT]))
    return option


def test_the_whole_suite_runs_in_two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    option = chosen()
    assert (option.numprocesses, option.dist, option.loadscopereorder) == (2, "loadfile", False)


@pytest.mark.parametrize(
    "options",
    [
        {"source": pytest.Config.ArgsSource.ARGS},
        {"keyword": "lora"},
        {"markexpr": "documentation"},
        {"usepdb": True},
        {"numprocesses": 0},
    ],
    ids=str,
)
def test_a_part_runs_in_one(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    assert chosen(**options).dist == "no"


def test_a_worker_starts_no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """pytest-xdist runs the hook in each worker too."""
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    assert chosen().dist == "no"
