"""Runs with `orchestrator.stop`: what is recorded and learned is what was sampled, and a replay gives the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.command_line import SHORT, Home
from vlmrl.record.metrics import read_metrics
from vlmrl.record.rollouts import read_rollouts
from vlmrl.record.tokens import read_spellings

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("renderer", ["auto", "template"])
def test_turns_that_a_stop_string_ended_are_bridged_learned_and_replayed(home: Home, renderer: str) -> None:
    """After ten supervised steps most answers are letters, so many end at the letter C."""
    stop = ("orchestrator.stop=['zz', C]", f"orchestrator.renderer.name={renderer}", "trainer.max_steps=2")
    run = home.made(f"stopped_{renderer}", (*SHORT, *stop))
    records = list(read_rollouts(run / "rollouts/step_000002.parquet"))
    spelled = read_spellings(run / "tokens.jsonl")
    turns = [turn for record in records for turn in record["turns"]]
    stopped = [turn for turn in turns if turn["stop"] is not None]
    assert len(stopped) > 3
    assert {turn["stop"] for turn in stopped} == {"C"}
    for turn in stopped:
        assert turn["finish_reason"] == "stop"
        *before, last = (spelled[token] for token in turn["completion_ids"])
        assert "C" in last
        assert not any("C" in each for each in before)
    assert all("C" not in turn["text"] for turn in turns)
    followed = [
        (turn, later) for record in records for turn, later in zip(record["turns"], record["turns"][1:], strict=False)
    ]
    assert any(turn["stop"] for turn, _ in followed)
    for turn, later in followed:
        sampled = [*turn["prompt_token_ids"], *turn["completion_ids"]]
        assert later["prompt_token_ids"][: len(sampled)] == sampled
        closing = spelled[later["prompt_token_ids"][len(sampled)]]
        assert closing == ("<|im_end|>" if turn["stop"] else "\n")
    metrics = [metrics for metrics in read_metrics(run / "metrics.jsonl") if "loss" in metrics]
    assert [each["bridge_break_rate"] for each in metrics] == [0, 0]
    assert all(each["mismatch_kl/mean"] < 1e-10 for each in metrics)
    ended = home.vlmrl("mode=replay", f"run={run}", "step=1")
    assert (ended.code, ended.err) == (0, "")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("['']", "orchestrator.stop="),
        (str(["x"] * 17).replace("'", ""), "orchestrator.stop has 17 texts"),
    ],
)
def test_stop_strings_that_cannot_be_found_are_refused(home: Home, tmp_path: Path, value: str, words: str) -> None:
    ended = home.vlmrl(f"orchestrator.stop={value}", f"hydra.run.dir={tmp_path / 'refused'}")
    assert ended.code == 2
    assert ended.err.startswith(f"error: {words}"), ended.err


def test_a_player_s_answer_ends_at_a_stop_string(home: Home) -> None:
    (home.path / "speaker.py").write_text("def answer():\n    return 'look. Observation: red'\n")
    run = home.path / "outputs" / "spoken"
    ended = home.vlmrl(
        *(
            "mode=play",
            "play.policy=speaker:answer",
            "orchestrator.stop=['Observation:']",
            "orchestrator.max_new_tokens=64",
        ),
        "monitor.report=false",
        f"hydra.run.dir={run}",
    )
    assert (ended.code, ended.err) == (0, "")
    assert "answered 'look. ' (" in ended.out
    assert "ended by 'Observation:')" in ended.out
    (record,) = read_rollouts(next((run / "rollouts").iterdir()))
    assert {(turn["text"], turn["stop"], turn["finish_reason"]) for turn in record["turns"]} == {
        ("look. ", "Observation:", "stop")
    }
