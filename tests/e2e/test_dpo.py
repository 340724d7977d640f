"""`mode=dpo` by the real command: from rows with pictures, resumed bit for bit, and from the rollouts of a run."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PILImage

from support.command_line import Home, steady, summary
from vlmrl.record.metrics import read_metrics

pytestmark = pytest.mark.slow

QUIET = ("monitor.report=false", "monitor.wandb.mode=disabled", "orchestrator.eval.every=6")
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "white": (240, 240, 240)}


def pairs_file(folder: Path, rows: int = 240) -> Path:
    """A square of one colour, its name as the better answer and another name as the worse one. No two squares are
    equal, so that those held out were never seen."""
    folder.mkdir()
    random, names, lines = np.random.default_rng(0), list(COLOURS), []
    for row in range(rows):
        right, wrong = random.permutation(len(names))[:2]
        pixels = np.clip(np.array(COLOURS[names[right]]) + random.integers(-10, 10, (32, 32, 3)), 0, 255)
        PILImage.fromarray(pixels.astype(np.uint8)).save(folder / f"{row}.png")
        answers = {"chosen": names[right], "rejected": names[wrong]}
        lines.append(json.dumps({"question": "<image>Which colour?", "image": f"{row}.png", **answers}))
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(lines))
    return path


def evaluations(run: Path, key: str) -> list[float]:
    return [line[key] for line in read_metrics(run / "metrics.jsonl") if key in line]


@pytest.fixture(scope="module")
def colours(home: Home) -> Path:
    return pairs_file(home.path / "colours")


def test_pictures_decide_which_answer_is_better(home: Home, colours: Path) -> None:
    settings: tuple[str, ...] = ("mode=dpo", "task=dataset", f"task.path={colours}", "model=qwen3vl_tiny", *QUIET)
    settings += ("trainer.max_steps=12", "trainer.checkpoint_every=6", "trainer.keep_best=eval/dpo/accuracy")
    run = home.made("colours", settings)
    accuracies = evaluations(run, "eval/dpo/accuracy")
    assert accuracies[0] == 0.5, "the policy is its reference"
    assert accuracies[-1] > 0.9
    assert evaluations(run, "eval/dpo/loss")[0] == pytest.approx(math.log(2), rel=1e-6)
    lines = steady(run / "metrics.jsonl")
    assert [line["policy_version"] for line in lines[1:]] == list(range(1, 13))
    assert all(line["dpo/pairs"] == 32 and line["tokens/packed"] < line["tokens/unpacked"] for line in lines[1:])
    assert not [key for key in lines[-1] if key.startswith(("mismatch_kl", "staleness", "reward/"))]
    assert not list((run / "rollouts").glob("step_*")), "nothing is sampled to learn from"
    resumed = home.copy(run, "colours_resumed")
    shutil.rmtree(resumed / "checkpoints/step_000012")
    assert home.vlmrl(f"resume={resumed}").code == 0
    assert steady(resumed / "metrics.jsonl") == lines, "steps 7 to 12 are made again, bit for bit"


def test_the_rollouts_of_a_run_are_compared(home: Home, colours: Path) -> None:
    """After a warm-up on random answers, some rollouts of a group name the right colour and others do not."""
    rows = ("task=dataset", f"task.path={colours}", "task.columns.answer=chosen", "reward=exact", *QUIET)
    sampling: tuple[str, ...] = (
        "trainer.warmup.steps=15",
        "trainer.warmup.batch_size=32",
        "trainer.learning_rate=1e-6",
    )
    sampling += ("trainer.max_steps=2", "orchestrator.groups_per_step=64", "orchestrator.eval.problems=0")
    tiny = ("model=qwen3vl_tiny", "orchestrator.max_new_tokens=8", *rows)
    sampled = home.made("sampled", (*tiny, *sampling, "orchestrator.eval.every=0"))
    learning = ("mode=dpo", f"dpo.from_run={sampled}", "trainer.max_steps=12", "orchestrator.eval.problems=24")
    run = home.made("compared", (*tiny, *learning))
    accuracies = evaluations(run, "eval/dpo/accuracy")
    assert accuracies[0] == 0.5
    assert accuracies[-1] > 0.9, "of problems that were never learned from"
    assert "eval/reward" in read_metrics(run / "metrics.jsonl")[-1], "what is scored is sampled, too"
    assert summary(run)["exit_reason"] == "finished"
