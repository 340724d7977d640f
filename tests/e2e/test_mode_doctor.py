"""mode=doctor as a user runs it: its output, its files, its exit code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from support.command_line import Home, keys_found, summary
from vlmrl.inference.vllm.server import vllm_version
from vlmrl.record.run_dir import RunDir
from vlmrl.runs.doctor.doctor import CHECKS

pytestmark = pytest.mark.slow


def table(run: Path) -> list[dict[str, Any]]:
    """The lines of doctor.json."""
    lines: list[dict[str, Any]] = json.loads((run / "doctor.json").read_bytes())["checks"]
    assert [line["name"] for line in lines] == list(CHECKS)
    return lines


def test_a_sound_run(home: Home) -> None:
    run = home.path / "outputs/doctor"
    ended = home.vlmrl("mode=doctor", f"hydra.run.dir={run}")
    assert (ended.code, ended.err) == (0, "")
    assert {line["verdict"] for line in table(run)} == {"ok"}
    for line in table(run):
        assert line["says"] in ended.out
    assert "\x1b" not in ended.out
    assert summary(run)["exit_reason"] == "finished"
    assert {path.name for path in (run / "rollouts").iterdir()} == {"step_000000.parquet", "step_000001.parquet"}
    assert not list((run / "checkpoints").iterdir()), "nothing is saved"
    assert not (run / "wandb").exists(), "nothing is logged"
    mode = RunDir(run).read_config().monitor.wandb.mode
    assert mode == "offline", "config.yaml says what monitor.wandb.mode=auto means on this machine"
    assert ended.seconds < 150


def test_a_run_that_would_not_work(home: Home) -> None:
    run = home.path / "outputs/doctor_of_faults"
    ended = home.vlmrl("mode=doctor", "task=their_tasks:AllFaults", f"hydra.run.dir={run}")
    assert ended.code == 1
    assert ended.err.startswith(
        f"error: 2 of {len(CHECKS)} lines failed, so a run would learn from something other than what it sampled, "
        "or not at all:\n"
    )
    assert (
        "\n  rollouts, version 0: train/000000/00/00 ended as task_error: step() raised LookupError: no score"
        in ended.err
    )
    assert "Traceback" not in ended.err
    verdicts = {line["name"]: line["verdict"] for line in table(run)}
    assert verdicts["rollouts, version 0"] == "FAILED"
    assert summary(run)["exit_reason"] == "error"
    assert "rollouts, version 0" in summary(run)["error"]


@pytest.mark.vllm
@pytest.mark.skipif(vllm_version() is None, reason="vLLM is not installed")
def test_a_sound_run_with_vllm(home: Home) -> None:
    run = home.path / "outputs/doctor_of_vllm"
    ended = home.vlmrl("mode=doctor", "inference=vllm", "weight_sync.verify=false", f"hydra.run.dir={run}")
    assert (ended.code, ended.err) == (0, "")
    lines = {line["name"]: line for line in table(run)}
    assert {name for name, line in lines.items() if line["verdict"] != "ok"} == {"positions, engine"}
    assert "wrong positions would show in the logprobs" in lines["positions, engine"]["says"]
    assert lines["weights"]["figures"]["compared"] > 40
    for version in (0, 1):
        assert 0 < lines[f"logprobs, version {version}"]["figures"]["mismatch_kl"] <= 1e-11
    assert any(path.name.startswith("vllm") for path in (run / "logs").iterdir()), "the server's own log is there"
    assert keys_found(run) == set()
