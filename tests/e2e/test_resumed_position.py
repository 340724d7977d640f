"""A resumed run goes on where it stopped: with weights that had no gradient yet, and with the next problem."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from support.command_line import Ended, Home, Scenarios, steady, steady_rollouts
from vlmrl.orchestrator.supervised import AFTER_WARMUP

pytestmark = pytest.mark.slow

SHORT = (
    "trainer.warmup.steps=0",
    "trainer.checkpoint_every=2",
    "trainer.keep_checkpoints=9",
    "trainer.max_steps=4",
    "orchestrator.groups_per_step=2",
    "orchestrator.group_size=2",
    "orchestrator.eval.every=0",
    "orchestrator.max_new_tokens=4",
    "algorithm.credit=episode",
    "monitor.wandb.mode=disabled",
    "monitor.report=false",
    "monitor.vision_gap_every=0",
)

TEXT = (*SHORT, "task=their_tasks:LateImages", "task.args.first_image=4")
"""The first four problems, which are those of two steps, show no image."""


NUMBERED = (*SHORT, "task=their_tasks:Sound")


@pytest.fixture(scope="module")
def runs(home: Home) -> Scenarios:
    """Everything of this module that starts processes: name → folder of a run."""

    def text() -> tuple[Path, Path]:
        # The default decay ends at max_steps, so a run that is to be continued has none.
        start, steps = (*TEXT, "trainer.decay=constant"), "trainer.max_steps"
        never_stopped = home.made("text", (*start, f"{steps}=4"))
        return never_stopped, home.made("text_resumed", (*start, f"{steps}=2"), (f"{steps}=4",))

    def supervised() -> tuple[Path, Path]:
        start, steps = (*TEXT, "mode=sft", "trainer.warmup.batch_size=2"), "trainer.warmup.steps"
        never_stopped = home.made("supervised", (*start, f"{steps}=4"))
        return never_stopped, home.made("supervised_resumed", (*start, f"{steps}=2"), (f"{steps}=4",))

    def used() -> Path:
        """What else is done with a checkpoint that has seen no image."""
        problems = "orchestrator.eval.problems=2"
        run = home.made(
            "used",
            (*TEXT, "trainer.max_steps=2", "trainer.checkpoint_every=1"),
            ("mode=eval", problems),
            ("mode=export",),
        )
        ended = home.vlmrl("mode=replay", f"run={run}", "step=2")
        assert (ended.code, ended.err) == (0, ""), ended
        return run

    def renamed() -> Ended:
        run = home.made("renamed", (*NUMBERED, "trainer.max_steps=1"))
        (run / "checkpoints/step_000001").rename(run / "checkpoints/step_000007")
        return home.vlmrl(f"resume={run}", "trainer.max_steps=2")

    def other_batches() -> Path:
        groups, mixed = "orchestrator.groups_per_step", "trainer.warmup.rl_batch_size"
        start = (*NUMBERED, "trainer.warmup.steps=1", "trainer.warmup.batch_size=1", "trainer.warmup.rl_weight=0.1")
        return home.made(
            "other_batches",
            (*start, f"{groups}=4", f"{mixed}=1", "trainer.max_steps=2"),
            (f"{groups}=1", f"{mixed}=2", "trainer.max_steps=4"),
            (f"{groups}=3", "trainer.max_steps=5"),
        )

    return Scenarios(text=text, supervised=supervised, used=used, renamed=renamed, other_batches=other_batches)


@pytest.mark.parametrize("mode", ["text", "supervised"])
def test_the_first_image_comes_after_the_checkpoint(mode: str, runs: Scenarios) -> None:
    """The vision tower gets its first gradient, and its place in the optimizer, after the resume."""
    never_stopped, resumed = runs[mode]
    if mode == "text":
        rollouts = steady_rollouts(resumed)
        shows_images = [
            any(turn["placeholders"] for record in records for turn in record["turns"]) for records in rollouts.values()
        ]
        assert shows_images == [False, False, True, True], "else the test shows nothing"
        assert rollouts == steady_rollouts(never_stopped)
    name = "metrics.jsonl" if mode == "text" else "supervised.jsonl"
    assert len(steady(resumed / name)) == 4
    assert steady(resumed / name) == steady(never_stopped / name)
    newest = "checkpoints/step_000004/shard-00001-model-0000{}-of-00002.safetensors"
    for part in (1, 2):
        ours, theirs = (load_file(run / newest.format(part)) for run in (resumed, never_stopped))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert float(ours["step/model.visual.patch_embed.proj.weight"]) == 2.0
    assert float(ours["step/model.language_model.norm.weight"]) == 4.0


def test_a_checkpoint_without_images_is_evaluated_exported_and_replayed(runs: Scenarios) -> None:
    run = runs["used"]
    assert (run / "eval/metrics.jsonl").exists()
    assert (run / "export/step_000002/model.safetensors").exists()
    lines = json.loads((run / "replay/step_000002/replay.json").read_bytes())["lines"]
    assert "differs" not in {line["verdict"] for line in lines}


def test_no_problem_is_repeated_or_skipped_with_another_batch_size(runs: Scenarios) -> None:
    """Four problems a step, then one, then three."""
    run = runs["other_batches"]
    played = [sorted({record["problem_id"] for record in records}) for records in steady_rollouts(run).values()]
    wanted = [[0, 1, 2, 3], [4, 5, 6, 7], [8], [9], [10, 11, 12]]
    assert played == [sorted(f"train/{index}/sound" for index in numbers) for numbers in wanted]
    state = json.loads((run / "checkpoints/step_000005/loop.json").read_bytes())
    assert state == {
        "evaluations": [],
        "is_evaluation_unfinished": False,
        "cursor": 13,
        "warmup_cursor": 1,
        "rl_demonstrations_cursor": AFTER_WARMUP + 1 + 2 * 1 + 3 * 2,
        "evaluation_count": 0,
        "best": None,
    }


def test_a_checkpoint_with_the_name_of_another_step_is_refused(runs: Scenarios) -> None:
    """Metrics are cut back to the step in the name; those of the weights would be written a second time."""
    ended = runs["renamed"]
    assert ended.code == 1
    assert "step_000007 was saved after step 1, so the record of the run would not fit it" in ended.err
    assert "Traceback" not in ended.err
