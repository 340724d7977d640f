"""The blind control on whole runs: one that has learned to see, and one whose task zeroes every pixel."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.command_line import Home, Scenarios, summary
from vlmrl.config.monitor import MonitorConfig
from vlmrl.record.metrics import read_metrics

MIN_GAP = MonitorConfig().blind_gap

pytestmark = pytest.mark.slow

ONE_SQUARE = (
    "task.max_turns=1",
    "orchestrator.groups_per_step=3",
    "orchestrator.group_size=16",
    "orchestrator.eval.every=0",
    "trainer.warmup.learning_rate=5e-3",
    "monitor.wandb.mode=disabled",
    *("monitor.blind_guard=stop", "monitor.blind_controls=4"),
)


@pytest.fixture(scope="module")
def runs(home: Home) -> Scenarios:
    def run(name: str, *arguments: str) -> Path:
        folder = home.path / "outputs" / name
        ended = home.vlmrl(*ONE_SQUARE, *arguments, f"hydra.run.dir={folder}")
        assert ended.code == 0, ended.err
        return folder

    return Scenarios(
        sighted=lambda: run(
            "sighted",
            "task.images_per_turn=1",
            "trainer.warmup.demonstrations=correct",
            "trainer.warmup.steps=40",
            "trainer.warmup.batch_size=32",
            "trainer.max_steps=12",
            "monitor.vision_gap_every=2",
        ),
        blind=lambda: run(
            "blind",
            "task=their_tasks:Blindfolded",
            "task.credit=turn",
            "orchestrator.max_new_tokens=10",
            "trainer.max_grad_norm=0.3",
            "trainer.warmup.rl_weight=0.04",
            "trainer.warmup.steps=15",
            "trainer.warmup.batch_size=16",
            "trainer.max_steps=20",
            "monitor.vision_gap_every=5",
        ),
    )


def gaps(run: Path) -> list[tuple[float, float]]:
    lines = read_metrics(run / "metrics.jsonl")
    return [(line["vision_gap/blank"], line["vision_gap/shuffled"]) for line in lines if "vision_gap/blank" in line]


def looks_away(run: Path) -> list[str]:
    return [text for text in summary(run)["warnings"] if "ignores its images" in text]


def test_a_policy_that_reads_the_squares_shows_a_clear_gap(runs: Scenarios) -> None:
    """Taught the true colours in 40 supervised steps; more than a nat per token is the letter alone."""
    run = runs["sighted"]
    assert read_metrics(run / "metrics.jsonl")[-1]["reward/mean"] > 0.8
    assert len(gaps(run)) == 6
    assert min(min(both) for both in gaps(run)) > 1.0
    assert looks_away(run) == []
    assert summary(run)["exit_reason"] == "finished"


def test_a_policy_whose_pixels_are_zeroed_shows_none_and_the_run_is_stopped(runs: Scenarios) -> None:
    run = runs["blind"]
    rewards = [line["reward/mean"] for line in read_metrics(run / "metrics.jsonl")]
    assert rewards[-1] > 0.6 > 0.3 > rewards[0], "it learns, and not from the images"
    assert len(gaps(run)) == 4
    assert all(abs(shuffled) < MIN_GAP for _, shuffled in gaps(run))
    assert all(abs(blank) < 5 * MIN_GAP for blank, _ in gaps(run))
    assert (summary(run)["exit_reason"], summary(run)["step"]) == ("blind", 16), "the fourth control decides"
    assert (run / "checkpoints/step_000016").is_dir()
    (text,) = looks_away(run)
    assert text in (run / "logs/main.log").read_text()
