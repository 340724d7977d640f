"""Which steps are captured, and what happens where that fails; the graphs themselves need a GPU."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vlmrl.inference.embedded.step_graphs import StepGraphs


class Recorded(StepGraphs):
    """Notes what is done in place of doing it on a GPU."""

    def __init__(self, *errors: Exception | None) -> None:
        """`errors` are raised by the captures, in turn."""
        super().__init__(torch.device("cpu"))
        self._captures = True
        self.errors = list(errors)
        self.done: list[str] = []

    def _run_apart(self, step: Callable[[], None]) -> None:
        self.done.append("run")

    def _recorded(self, step: Callable[[], None]) -> Any:
        error = self.errors.pop(0) if self.errors else None
        if error is not None:
            self.done.append("failed")
            raise error
        self.done.append("capture")
        return SimpleNamespace(replay=lambda: self.done.append("replay"))

    def steps(self, *steps: tuple[str, str]) -> list[str]:
        """Run steps of (kind, code) → what was done."""
        self.done = []
        for kind, code in steps:
            self.run(kind, code, lambda: self.done.append("step"))
        return self.done


def test_the_first_step_of_a_code_runs_and_the_first_of_a_kind_is_captured() -> None:
    graphs = Recorded()
    assert graphs.steps(("a", "x"), ("a", "x"), ("a", "x")) == ["run", "capture", "replay", "replay"]
    assert graphs.steps(("b", "x"), ("a", "x"), ("b", "x")) == ["capture", "replay", "replay", "replay"]
    assert graphs.steps(("c", "y"), ("c", "y")) == ["run", "capture", "replay"]


def test_what_has_run_need_not_run_again_when_the_graphs_are_dropped() -> None:
    graphs = Recorded()
    graphs.steps(("a", "x"), ("a", "x"))
    graphs.clear()
    assert graphs.steps(("a", "x"), ("a", "x")) == ["capture", "replay", "replay"]


def test_a_capture_that_fails_has_one_more_try(caplog: pytest.LogCaptureFixture) -> None:
    """Something may have been compiled in it. After the second failure, steps run as they are."""
    once = Recorded(RuntimeError("compiled something"))
    wanted = ["run", "failed", "run", "capture", "replay", "replay"]
    assert once.steps(("a", "x"), ("a", "x"), ("a", "x"), ("a", "x")) == wanted
    twice = Recorded(RuntimeError("waits"), RuntimeError("waits for the device"))
    with caplog.at_level(logging.WARNING, logger="vlmrl"):
        done = twice.steps(("a", "x"), ("a", "x"), ("a", "x"), ("b", "y"))
    assert done == ["run", "failed", "run", "failed", "run", "step"]
    assert "waits for the device" in caplog.text


def test_a_capture_without_memory_frees_the_cache_first(monkeypatch: pytest.MonkeyPatch) -> None:
    emptied: list[bool] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    graphs = Recorded(torch.OutOfMemoryError("full"))
    assert graphs.steps(("a", "x"), ("a", "x")) == ["run", "failed", "capture", "replay"]
    assert emptied == [True]
    graphs = Recorded(torch.OutOfMemoryError("full"), torch.OutOfMemoryError("still full"))
    with pytest.raises(torch.OutOfMemoryError, match="still full"):
        graphs.steps(("a", "x"), ("a", "x"))


def test_on_a_cpu_every_step_runs_as_it_is() -> None:
    graphs, done = StepGraphs(torch.device("cpu")), list[int]()
    for number in range(3):
        graphs.run("a", "x", lambda number=number: done.append(number))  # type: ignore[misc]
    assert done == [0, 1, 2]
