"""Runs to be examined, built as the command builds them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from vlmrl.config import RunConfig
from vlmrl.monitor.monitor import Monitor
from vlmrl.monitor.run_dir import RunDir
from vlmrl.run import Run


@pytest.fixture(autouse=True)
def one_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLMRL_CACHE", str(tmp_path_factory.getbasetemp() / "doctor-cache"))


@pytest.fixture
def build(run_config: Callable[..., RunConfig], tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """`build("model.dtype=bfloat16")`: the parts of a run, as the command makes them."""
    threads = torch.get_num_threads()
    run_dir = RunDir(tmp_path / "run")
    run_dir.create()
    config = run_config("mode=doctor", "monitor.wandb.mode=disabled")
    with Monitor(config.monitor, run_dir, total_steps=1) as monitor:
        yield lambda *overrides: Run.build(run_config("mode=doctor", *overrides), run_dir, monitor)
    torch.set_num_threads(threads)


@pytest.fixture
def run(build: Callable[..., Run]) -> Run:
    return build()
