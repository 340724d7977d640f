"""mode=bench as a user runs it: its tables, its files, its exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.command_line import Home, summary
from vlmrl.inference.vllm.server import vllm_version
from vlmrl.record.metrics import read_metrics
from vlmrl.record.run_dir import RunDir

pytestmark = pytest.mark.slow

FEW = ("orchestrator.groups_per_step=2", "orchestrator.group_size=4", "bench.warmup_steps=1", "bench.steps=2")


def test_a_bench_of_the_default_run(home: Home) -> None:
    run = home.path / "outputs/bench"
    ended = home.vlmrl("mode=bench", *FEW, f"hydra.run.dir={run}")
    assert (ended.code, ended.err) == (0, "")
    for title in ("where a step goes", "beside what this machine could do", "verdict"):
        assert f"\n{title}\n" in ended.out
    found = json.loads((run / "bench.json").read_bytes())

    steps = read_metrics(run / "metrics.jsonl")[-2:]
    assert [step["step"] for step in steps] == [2, 3], "one step warms up"
    assert len(found["step_s"]["each"]) == 2
    assert sum(found["parts_s"].values()) == pytest.approx(found["step_s"]["mean"], rel=0.02)
    assert found["parts_s"]["training"] == pytest.approx(sum(step["time/train"] for step in steps) / 2)
    assert found["tokens"]["rows"] == sum(step["tokens/packed"] for step in steps) / 2
    assert found["tokens"]["tree_rows"] == found["tokens"]["rows"], "counted from the samples, as the trainer packed"
    assert found["tokens"]["turns"] == 2.0, "random answers count as ended, so each episode has its two turns"
    assert found["tokens"]["sampled"] == sum(step["tokens/completion"] for step in steps) / 2
    assert all(step["rollouts/dropped"] == 0 for step in steps), "every rollout is trained on"
    assert 0 < found["training"]["share_of_product"] < 1
    assert 0 < found["sampling"]["least_s"] < found["parts_s"]["sampling"]
    assert found["memory"]["peak_bytes"] > found["memory"]["planned_bytes"] > 0
    assert f"bounded by  {found['bounded_by']['part']}: " in ended.out
    for advice in found["advice"]:
        assert advice["finding"] in ended.out

    assert summary(run)["exit_reason"] == "finished"
    assert not list((run / "checkpoints").iterdir()), "nothing is saved"
    assert not (run / "wandb").exists(), "nothing is logged"
    assert not (run / "supervised.jsonl").exists(), "no warm-up is taken"
    config = RunDir(run).read_config()
    assert (config.orchestrator.eval.every, config.monitor.vision_gap_every) == (0, 0)


@pytest.mark.vllm
@pytest.mark.skipif(vllm_version() is None, reason="vLLM is not installed")
def test_a_bench_with_servers(home: Home) -> None:
    """The servers of a run, with its trainer and its weights; on a CPU their sampling has no limit to stand beside."""
    run = home.path / "outputs/bench_of_servers"
    ended = home.vlmrl("mode=bench", "inference=vllm", *FEW, f"hydra.run.dir={run}")
    assert ended.code == 0, ended.err
    found = json.loads((run / "bench.json").read_bytes())
    assert sum(found["parts_s"].values()) == pytest.approx(found["step_s"]["mean"], rel=0.02)
    assert found["parts_s"]["weight sync"] > 0
    assert found["sampling"]["tokens_per_s"] > 0
    assert found["sampling"]["least_s"] is None
    assert 0 < found["whole_step"]["share"] <= 1.05
    assert f"bounded by  {found['bounded_by']['part']}: " in ended.out
    assert summary(run)["exit_reason"] == "finished"


def test_a_bench_whose_task_fails_fails(home: Home) -> None:
    run = home.path / "outputs/bench_of_faults"
    ended = home.vlmrl("mode=bench", "task=their_tasks:AllFaults", *FEW, f"hydra.run.dir={run}")
    assert ended.code == 1
    assert "Traceback" not in ended.err
    assert not (run / "bench.json").exists()


def test_a_bench_is_not_resumed(home: Home, never_stopped: Path) -> None:
    ended = home.vlmrl("mode=bench", f"resume={never_stopped}")
    assert ended.code == 2
    assert "mode=bench cannot continue resume=" in ended.err
