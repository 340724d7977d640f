"""Runs with a second model, by the real command: resumed bit for bit, distilled, and refused where it does not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from support.command_line import SHORT, Home, assert_same_run, steady
from vlmrl.record.metrics import read_metrics

pytestmark = pytest.mark.slow

AVERAGE = (
    *("reference=ema", "reference.decay=0.5", "algorithm.kl.loss=0.1", "algorithm.kl.reward=0.01"),
    *("algorithm.distill.top_k=8", "algorithm.distill.weight=0.1"),
    "trainer.decay=constant",  # else the rate depends on the last step
)
DISTILL = (
    *("algorithm.advantage=none", "algorithm.kl.advantage=1", "orchestrator.group_size=1"),
    *("orchestrator.groups_per_step=8", "reference=folder"),
)


def test_a_run_that_stopped_goes_on_with_its_average(home: Home) -> None:
    whole = home.made("whole", (*SHORT, *AVERAGE))
    resumed = home.made("resumed", (*SHORT, *AVERAGE, "trainer.max_steps=4"), ("trainer.max_steps=6",))
    assert_same_run(resumed, whole)
    kls = [line["reference_kl/mean"] for line in steady(whole / "metrics.jsonl") if line["step"] > 0]
    assert kls[0] == 0.0, "the average begins as the policy after the warm-up"
    assert all(kl > 0 for kl in kls[1:])
    assert all(line["distill/divergence"] > 0 for line in steady(whole / "metrics.jsonl") if line["step"] > 1)


@pytest.fixture(scope="module")
def teacher(home: Home, never_stopped: Path) -> Path:
    """The exported weights of a run."""
    folder = home.path / "teacher"
    ended = home.vlmrl("mode=export", f"resume={never_stopped}", f"export.folder={folder}")
    assert ended.code == 0, ended.err
    return folder


def test_a_teacher_is_distilled_without_a_reward(home: Home, teacher: Path) -> None:
    run = home.made("distilled", (*SHORT, *DISTILL, f"reference.folder={teacher}", "trainer.warmup.steps=3"))
    lines = [line for line in read_metrics(run / "metrics.jsonl") if line["step"] > 0]
    assert lines[-1]["reference_kl/mean"] < lines[0]["reference_kl/mean"]
    assert all(line["time/reference"] > 0 and line["rollouts/dropped"] == 0 for line in lines)
    assert json.loads((run / "summary.json").read_bytes())["exit_reason"] == "finished"


def test_a_teacher_with_other_tokens_is_refused(home: Home, teacher: Path) -> None:
    other = Path(shutil.copytree(teacher, home.path / "other_tokens"))
    content = json.loads((other / "tokenizer.json").read_bytes())
    first, second = list(content["model"]["vocab"])[40:42]
    vocabulary = content["model"]["vocab"]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(content))
    ended = home.vlmrl(*SHORT, *DISTILL, f"reference.folder={other}", "hydra.run.dir=outputs/refused")
    assert ended.code == 2, ended.out
    assert "has another vocabulary than the policy" in ended.err
    nothing = home.vlmrl(*SHORT, *DISTILL, f"reference.folder={home.path}", "hydra.run.dir=outputs/nothing")
    assert nothing.code == 2
    assert "holds no config.json, so no reference can be loaded from it" in nothing.err


def test_the_doctor_and_a_replay_need_no_second_model(home: Home) -> None:
    ended = home.vlmrl("mode=doctor", "experiment=color_codeword_tiny", *AVERAGE, "monitor.wandb.mode=disabled")
    assert ended.code == 0, ended.out
    run = home.made("replayed", (*SHORT, *AVERAGE, "trainer.max_steps=2"))
    replayed = home.vlmrl("mode=replay", f"run={run}", "step=1")
    assert replayed.code == 0, replayed.out
    assert "logprobs, trainer  same" in replayed.out
