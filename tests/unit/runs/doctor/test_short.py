"""The short certificate: which runs it tries, what it keeps, and that it ends a run whose model it cannot vouch for."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig

from vlmrl.config.algorithm import Credit
from vlmrl.config.parse import parse
from vlmrl.config.run import Mode, RunConfig
from vlmrl.errors import ParityError
from vlmrl.monitor.monitor import Monitor
from vlmrl.preflight.auto_model import fill_model
from vlmrl.record.run_dir import RunDir
from vlmrl.runs.build import build_run
from vlmrl.runs.doctor.certificate import certificate
from vlmrl.runs.doctor.short import ShortCertificate, needs_certificate

UNKNOWN = "aya_vision"
LINES = [
    "token ids, first turns",
    "token ids, later turns",
    "pixels",
    "placeholders",
    "positions, trainer",
    "logprobs, transformers",
    "logprobs, one by one",
    "images, trainer",
]


@pytest.fixture
def config_of(composed: Callable[..., DictConfig], family_folder: Callable[[str], Path]) -> Callable[..., RunConfig]:
    def config(name: str, *overrides: str) -> RunConfig:
        words = ["model=auto", f"model.name={family_folder(name)}", "task=color_codeword", "trainer=scratch"]
        return fill_model(parse(composed(*words, *overrides)))[0]

    return config


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`build(config, "a")` builds the parts of a run in the folder `a`, as the command does; returns the folder."""
    monkeypatch.setenv("VLMRL_CACHE", str(tmp_path / "cache"))
    threads = torch.get_num_threads()

    def built(config: RunConfig, name: str) -> RunDir:
        run_dir = RunDir(tmp_path / name)
        run_dir.create()
        config = replace(config, output_dir=str(run_dir.path))
        with Monitor(config.monitor, run_dir, total_steps=1, exact=True, credit=Credit.turn) as monitor:
            build_run(config, run_dir, monitor)
        return run_dir

    yield built
    torch.set_num_threads(threads)


def test_only_runs_of_unknown_families_are_tried(config_of: Callable[..., RunConfig]) -> None:
    unknown = config_of(UNKNOWN)
    assert needs_certificate(unknown)
    assert needs_certificate(replace(unknown, mode=Mode.sft))
    assert not needs_certificate(replace(unknown, mode=Mode.doctor)), "it looks at more, and at the whole run"
    assert not needs_certificate(config_of("gemma3")), "it has a file in conf/model/vlm"
    assert not needs_certificate(config_of("qwen3")), "it has no images"


def test_it_is_kept_and_used_again(
    config_of: Callable[..., RunConfig],
    build: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = config_of(UNKNOWN, "monitor.wandb.mode=disabled")
    run_dir = build(config, "first")
    found = run_dir.read_doctor()
    assert [line["name"] for line in found["checks"]] == LINES
    assert {line["verdict"] for line in found["checks"]} == {"ok"}, found["checks"]
    (kept,) = (tmp_path / "cache/certificates").iterdir()
    assert json.loads(kept.read_bytes()) == found
    assert found["kept"] == str(kept)
    assert "logprobs, transformers  ok" in capsys.readouterr().out

    monkeypatch.setattr(ShortCertificate, "verdicts", lambda self: pytest.fail("it was tried again"))
    assert build(config, "second").read_doctor() == found
    assert str(kept) in capsys.readouterr().out
    with pytest.raises(pytest.fail.Exception):
        build(replace(config, trainer=replace(config.trainer, packing=type(config.trainer.packing).varlen)), "third")
    monkeypatch.setattr("vlmrl.runs.doctor.short.certificate", older(certificate))
    with pytest.raises(pytest.fail.Exception):
        build(config, "fourth")


def older(create: Any) -> Any:
    def of_other_versions(*arguments: Any) -> Any:
        found = create(*arguments)
        return found | {"versions": found["versions"] | {"transformers": "5.0.0"}}

    return of_other_versions


def test_a_model_that_computes_something_else_ends_the_run(
    config_of: Callable[..., RunConfig], build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Positions off by one behind images, as if the family's own function had been missed."""
    from vlmrl.models.policy import Policy

    create = Policy.__init__

    def off(self: Policy, *arguments: Any, **more: Any) -> None:
        create(self, *arguments, **more)
        right = self.positions
        self.positions = lambda length, places, images: right(length, places, images) + np.arange(length) % 2

    monkeypatch.setattr(Policy, "__init__", off)
    with pytest.raises(ParityError) as error:
        build(config_of(UNKNOWN, "monitor.wandb.mode=disabled"), "run")
    said = str(error.value)
    assert "2 of 8 lines failed" in said
    assert "\n  positions, trainer: " in said
    assert "\n  logprobs, transformers: " in said
    assert "model.vlm.family=aya_vision has no file in conf/model/vlm" in said
    assert "choose another model, or write conf/model/vlm/<family>.yaml" in said
    assert not (tmp_path / "cache/certificates").exists(), "what failed is tried again"
    lines = {line["name"]: line["verdict"] for line in RunDir(tmp_path / "run").read_doctor()["checks"]}  # type: ignore[index]
    assert lines["positions, trainer"] == "FAILED"
