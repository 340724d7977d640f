from __future__ import annotations

import pytest

from vlmrl.monitor.health import WINDOW, warnings_for
from vlmrl.monitor.metrics import Record


def history(**figures: float | None) -> list[Record]:
    """WINDOW lines with these figures (`reward__mean=…` for `reward/mean`) over healthy ones."""
    healthy: Record = {
        "groups/zero_advantage": 0.2,
        "rollouts/total": 100.0,
        "rollouts/dropped": 0.0,
        "mismatch_kl/max": 1e-9,
        "entropy": 0.5,
        "reward/mean": 0.4,
    }
    changes = {key.replace("__", "/"): value for key, value in figures.items()}
    return [{"step": step, **healthy, **changes} for step in range(1, WINDOW + 1)]


def test_a_healthy_run_has_no_warning() -> None:
    assert warnings_for(history()) == []
    assert warnings_for([]) == []
    assert warnings_for([{"step": 0, "eval/reward": 0.0}]) == []


def test_equal_rewards_everywhere_for_all_steps() -> None:
    (text,) = warnings_for(history(groups__zero_advantage=1.0))
    assert text.startswith("All rollouts of every group have had equal rewards for 5 steps")
    assert "temperature too low" in text


def test_one_step_with_a_signal_is_enough() -> None:
    lines = history(groups__zero_advantage=1.0)
    lines[2]["groups/zero_advantage"] = 0.875
    assert warnings_for(lines) == []
    assert warnings_for(history(groups__zero_advantage=1.0)[1:]) == []


@pytest.mark.parametrize(("dropped", "warned"), [(20.0, False), (21.0, True)])
def test_many_drops(dropped: float, warned: bool) -> None:
    assert bool(warnings_for(history(rollouts__dropped=dropped, rollouts__dropped__stale=dropped))) is warned


def test_drops_name_the_main_reason() -> None:
    lines = history(rollouts__dropped=50.0, rollouts__dropped__stale=20.0, rollouts__dropped__fault=30.0)
    assert "(most of them: fault)" in warnings_for(lines)[0]


def test_drops_that_the_algorithm_asked_for_do_not_count() -> None:
    lines = history(rollouts__dropped=90.0, rollouts__dropped__zero_advantage=80.0, rollouts__dropped__fault=10.0)
    assert warnings_for(lines) == []


def test_mismatch_counts_at_the_newest_step() -> None:
    assert "mismatch_kl/max above 0.001" in warnings_for(history(mismatch_kl__max=2e-3))[0]
    lines = history(mismatch_kl__max=2e-3)
    lines[-1]["mismatch_kl/max"] = 1e-9
    assert warnings_for(lines) == []


def test_entropy_collapse_unless_solved() -> None:
    assert "settled on one answer" in warnings_for(history(entropy=0.001))[0]
    assert warnings_for(history(entropy=0.001, reward__mean=0.97)) == []


def test_figures_that_are_not_finite_are_null_and_do_not_raise() -> None:
    nulls = history(entropy=None, mismatch_kl__max=None, rollouts__dropped=None, groups__zero_advantage=None)
    assert warnings_for(nulls) == []


def test_the_same_trouble_is_the_same_text() -> None:
    first = warnings_for(history(rollouts__dropped=50.0, mismatch_kl__max=0.1))
    assert first == warnings_for(history(rollouts__dropped=60.0, mismatch_kl__max=0.2))
