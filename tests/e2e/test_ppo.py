"""A run with a value head, by the real command: it goes on bit for bit after a stop."""

from __future__ import annotations

import pytest

from support.command_line import SHORT, Home, assert_same_run
from vlmrl.record.metrics import read_metrics

pytestmark = pytest.mark.slow

PPO = (
    *("algorithm=ppo", "algorithm.minibatches=2", "algorithm.credit=return", "trainer.max_steps=4"),
    "trainer.decay=constant",  # else the rate depends on the last step
)


def test_a_run_that_stopped_goes_on_with_its_value_head(home: Home) -> None:
    whole = home.made("whole", (*SHORT, *PPO))
    resumed = home.made("resumed", (*SHORT, *PPO, "trainer.max_steps=2"), ("trainer.max_steps=4",))
    assert_same_run(resumed, whole)
    lines = [line for line in read_metrics(whole / "metrics.jsonl") if line["step"] > 0]
    assert [line["optimizer_steps"] for line in lines] == [4] * 4
    assert all(line["time/values"] > 0 and line["value/loss"] >= 0 for line in lines)
    assert lines[0]["value/mean"] == 0.0
    assert lines[-1]["value/mean"] != 0.0
