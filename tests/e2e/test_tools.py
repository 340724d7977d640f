"""Runs with tools, by the real command: played, trained, examined by the doctor, replayed and resumed."""

from __future__ import annotations

from pathlib import Path

import pytest

from support import TESTS
from support.command_line import Home
from vlmrl.record.metrics import read_metrics
from vlmrl.record.rollouts import RolloutRecord, read_rollouts

pytestmark = pytest.mark.slow

READER = f"{TESTS}/support/print_reader.py"
SMALL = (
    *("experiment=small_print_tiny", "trainer.warmup.steps=2", "trainer.warmup.batch_size=2", "trainer.max_steps=2"),
    *("orchestrator.groups_per_step=2", "orchestrator.group_size=2", "orchestrator.eval.problems=2"),
    *("orchestrator.eval.every=2", "trainer.checkpoint_every=1", "monitor.wandb.mode=disabled", "monitor.report=false"),
)


def recorded(run: Path) -> list[RolloutRecord]:
    return [rollout for path in sorted((run / "rollouts").iterdir()) for rollout in read_rollouts(path)]


def test_who_looks_closer_is_paid(home: Home) -> None:
    run = home.path / "outputs/reader"
    ended = home.vlmrl(
        *("mode=play", "experiment=small_print_tiny", f"play.policy={READER}:read", "play.episodes=4"),
        *(f"hydra.run.dir={run}", "monitor.report=false"),
    )
    assert "tool zoom: 'Image 2: ', an image" in ended.out
    rollouts = recorded(run)
    assert [(each["reward"], each["stop_reason"], len(each["turns"])) for each in rollouts] == [
        (1.0, "terminated", 2)
    ] * 4
    assert len({each["problem_id"].partition(": ")[2] for each in rollouts}) == 4
    first, second = rollouts[0]["turns"]
    assert [tool["name"] for tool in first["tools"]] == ["zoom"]
    (result,) = second["messages"]
    assert (result["role"], result["name"]) == ("tool", "zoom")
    assert [part["type"] for part in result["content"]] == ["text", "image"]
    assert second["prompt_offset"] == len(first["prompt_token_ids"]) + len(first["completion_ids"])
    assert len(second["placeholders"]) == 2


def test_a_call_of_nothing_is_told_so(home: Home) -> None:
    run = home.path / "outputs/blind"
    ended = home.vlmrl(
        *("mode=play", "experiment=small_print_tiny", f"play.policy={READER}:blind", "play.episodes=4"),
        *(f"hydra.run.dir={run}", "monitor.report=false"),
    )
    assert "There is no tool of that name. The tools are: zoom." in ended.out
    assert sum(each["reward"] for each in recorded(run)) == 1.0  # R is one of the four letters of a block


def test_a_run_is_replayed_and_goes_on(home: Home) -> None:
    run = home.path / "outputs/tools"
    home.vlmrl(*SMALL, f"hydra.run.dir={run}")
    home.vlmrl(f"resume={run}", "trainer.max_steps=3")
    steps = [step for step in read_metrics(run / "metrics.jsonl") if step["step"] > 0]
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert {step["bridge_break_rate"] for step in steps} == {0.0}
    assert all("tools/calls" in step and "turns/bridged" in step for step in steps)
    assert "eval/tools/calls" in steps[1]
    replay = home.vlmrl("mode=replay", f"run={run}", "step=1")
    for name in ("pictures", "prompts", "completions", "logprobs, engine", "logprobs, trainer"):
        assert f"{name:<18} same" in replay.out


def test_the_doctor_compares_turns_with_results(home: Home) -> None:
    ended = home.vlmrl("mode=doctor", "experiment=small_print_tiny", "monitor.wandb.mode=disabled")
    line = next(line for line in ended.out.splitlines() if "token ids, later turns" in line)
    assert "ok" in line
    assert "are the chat template's" in line
