"""`task=gymnasium` from the command line: a run whose conversations start over, in worker processes, and its replay."""

from __future__ import annotations

import json

import pytest

from support.command_line import SHORT, Home
from vlmrl.record.rollouts import read_rollouts

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return Home(tmp_path_factory.mktemp("gymnasium"))


def test_a_run_in_worker_processes_is_replayed_bit_for_bit(home: Home) -> None:
    """The recipe on lakes, with two frames in the context."""
    settings = ("task.workers=process", "task.history=2", "task.max_turns=4", "trainer.max_steps=2")
    run = home.made("lakes", ("experiment=frozenlake_tiny", *SHORT, *settings))
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    step = next(step for step in steps if "history_cut_rate" in step)
    assert (step["bridge_break_rate"], 0 < step["history_cut_rate"] <= 2 / 3) == (0.0, True)
    assert {"task/success", "task/invalid", "task/return", "task/turns", "env/step_ms"} <= step.keys()

    rollouts = list(read_rollouts(run / "rollouts/step_000001.parquet"))
    assert {tuple(turn["starts_over"] for turn in rollout["turns"]) for rollout in rollouts} <= {
        (False, False, True, True)[:turns] for turns in range(1, 5)
    }
    for turn in (turn for rollout in rollouts for turn in rollout["turns"] if turn["starts_over"]):
        assert [message["role"] for message in turn["messages"]] == ["user", "assistant", "user"]
        assert len(turn["placeholders"]) == 2

    ended = home.vlmrl("mode=replay", f"run={run}", "step=1")
    assert ended.code == 0, ended.out + ended.err
    replayed = json.loads((run / "replay/step_000001/replay.json").read_bytes())
    assert {line["verdict"] for line in replayed["lines"]} == {"same"}, replayed


def test_the_counts_of_start_states_are_on_the_screen(home: Home) -> None:
    ended = home.vlmrl("dry_run=true", "task=gymnasium", "task.env_id=FrozenLake-v1", "trainer.seq_len=2048")
    assert (ended.code, ended.err) == (0, "")
    assert "1 in 128 seeds, fewer than task.holdout_one_in=8: none is held out" in ended.out


def test_what_cannot_be_played_ends_the_command_in_words(home: Home) -> None:
    ended = home.vlmrl("dry_run=true", "task=gymnasium", "task.env_id=Pendulum-v1")
    assert ended.code != 0
    assert "task.env_id=Pendulum-v1 has the action space Box(-2.0, 2.0, (1,), float32)" in ended.err
    assert "Traceback" not in ended.err
