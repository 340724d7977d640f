"""`mode=sft` by the real command: the held-out loss ends the run and keeps the best checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from support.command_line import Home, steady, summary
from vlmrl.record.metrics import DEMONSTRATION_LOSS

pytestmark = pytest.mark.slow

EVERY, PATIENCE, MOST = 5, 3, 400


def test_a_supervised_run_ends_where_the_held_out_loss_rises(home: Home) -> None:
    """Answers without a rule can be learned by heart, which makes held-out answers less likely."""
    random, path = np.random.default_rng(0), home.path / "by_heart.jsonl"
    rows = [{"question": f"What is {row}?", "answer": str(random.integers(10))} for row in range(24)]
    path.write_text("\n".join(map(json.dumps, rows)))
    run = home.made(
        "by_heart",
        (
            *("mode=sft", "task=dataset", f"task.path={path}", "task.eval_fraction=0.4", "model=qwen3vl_tiny"),
            *("trainer.warmup.demonstrations=correct", f"trainer.warmup.steps={MOST}", "trainer.warmup.batch_size=8"),
            *("trainer.keep_best=eval/demonstration_loss", f"trainer.patience={PATIENCE}"),
            *(f"trainer.checkpoint_every={EVERY}", f"orchestrator.eval.every={EVERY}", "monitor.report=false"),
            "monitor.wandb.mode=disabled",
        ),
    )
    lines = steady(run / "supervised.jsonl")
    losses = {line["step"]: line[DEMONSTRATION_LOSS] for line in lines if DEMONSTRATION_LOSS in line}
    best = min(losses, key=lambda step: losses[step])
    assert summary(run)["exit_reason"] == "no_improvement"
    assert lines[-1]["step"] == best + PATIENCE * EVERY < MOST
    assert json.loads((run / "checkpoints/best.json").read_bytes())["step"] == best
    assert checkpoints(run) >= {f"step_{best:06d}", f"step_{best + PATIENCE * EVERY:06d}"}
    assert all(line["tokens/trained"] < line["tokens/packed"] < line["tokens/unpacked"] for line in lines)

    resumed = home.copy(run, "by_heart_resumed")
    shutil.rmtree(resumed / f"checkpoints/step_{best + PATIENCE * EVERY:06d}")
    assert home.vlmrl(f"resume={resumed}").code == 0
    assert steady(resumed / "supervised.jsonl") == lines, "the evaluations before the checkpoint count, too"
    assert summary(resumed)["exit_reason"] == "no_improvement"


def checkpoints(run: Path) -> set[str]:
    return {path.name for path in (run / "checkpoints").iterdir() if path.is_dir()}
