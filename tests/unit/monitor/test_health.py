from __future__ import annotations

from dataclasses import replace

import pytest

from vlmrl.config.algorithm import Credit
from vlmrl.config.monitor import BlindGuard, MonitorConfig
from vlmrl.monitor.health import HISTORY, REMEDIES, WINDOW, is_blind, warnings_for
from vlmrl.record.metrics import Record
from vlmrl.types import DropReason


def history(*, steps: int = WINDOW, **figures: float | None) -> list[Record]:
    """Lines with these values (`reward__mean=…` for `reward/mean`) replaced in healthy ones."""
    healthy: Record = {
        "groups/equal_compared": 0.2,
        "rollouts/total": 100.0,
        "rollouts/dropped": 0.0,
        "rollouts/stop/max_new_tokens": 5.0,
        "mismatch_kl/mean": 1e-12,
        "mismatch_kl/max": 1e-9,
        "entropy": 0.5,
        "reward/mean": 0.4,
        "time/step": 2.0,
        "time/rollout": 1.0,
        "time/train": 0.9,
        "time/engine_idle": 0.9,
    }
    changes = {key.replace("__", "/"): value for key, value in figures.items()}
    return [{"step": step, **healthy, **changes} for step in range(1, steps + 1)]


def said(lines: list[Record], *, exact: bool = True) -> list[str]:
    return warnings_for(lines, exact=exact)


def test_a_healthy_run_has_no_warning() -> None:
    assert said(history()) == []
    assert said([]) == []
    assert said([{"step": 0, "eval/reward": 0.0}]) == []


def test_equal_rewards_everywhere_for_all_steps() -> None:
    (text,) = said(history(groups__equal_compared=1.0))
    assert text.startswith("For 5 steps, the rewards that algorithm.credit=episode compares (the episode's reward) ")
    assert "have been equal within every group" in text
    assert "raise orchestrator.group_size or orchestrator.temperature" in text


def test_the_warning_names_the_rewards_that_are_compared() -> None:
    (text,) = warnings_for(history(groups__equal_compared=1.0), exact=True, credit=Credit.turn)
    assert "algorithm.credit=turn compares (each turn's turn_reward) have been equal" in text
    assert "set algorithm.credit=episode" in text
    (text,) = warnings_for(history(groups__equal_compared=1.0), exact=True, credit=Credit["return"])
    assert "algorithm.credit=return compares (the turn_reward of each turn and later ones) have been equal" in text
    assert "set algorithm.credit=episode" in text
    (text,) = warnings_for(history(groups__equal_compared=1.0), exact=True, credit=Credit.episode)
    assert "turn_reward" not in text
    assert "set algorithm.credit" not in text


def test_one_step_with_a_signal_is_enough() -> None:
    lines = history(groups__equal_compared=1.0)
    lines[2]["groups/equal_compared"] = 0.875
    assert said(lines) == []
    assert said(history(groups__equal_compared=1.0)[1:]) == []


@pytest.mark.parametrize(("dropped", "warned"), [(20.0, False), (21.0, True)])
def test_many_drops(dropped: float, warned: bool) -> None:
    texts = said(history(rollouts__dropped=dropped, rollouts__dropped__stale=dropped))
    assert bool(texts) is warned
    assert all("dropped as stale: the engine is too far behind" in text for text in texts)
    assert all("Raise orchestrator.max_staleness" in text for text in texts)


def test_drops_name_the_main_reason() -> None:
    lines = history(rollouts__dropped=50.0, rollouts__dropped__stale=20.0, rollouts__dropped__fault=30.0)
    assert "dropped as fault: python -m vlmrl mode=faults run=" in said(lines)[0]


def test_every_reason_for_a_drop_has_a_remedy() -> None:
    assert set(REMEDIES) == {reason.value for reason in DropReason} - {DropReason.ZERO_ADVANTAGE.value}


def test_rollouts_dropped_as_zero_advantage_do_not_count() -> None:
    lines = history(rollouts__dropped=90.0, rollouts__dropped__zero_advantage=80.0, rollouts__dropped__fault=10.0)
    assert said(lines) == []


@pytest.mark.parametrize(
    ("reason", "remedy"),
    [("max_new_tokens", "raise orchestrator.max_new_tokens"), ("context_full", "raise trainer.seq_len")],
)
def test_answers_that_are_cut(reason: str, remedy: str) -> None:
    lines = history()
    for line in lines:
        line[f"rollouts/stop/{reason}"] = 60.0
    (text,) = said(lines)
    assert remedy in text
    assert said(lines[1:]) == [], "early in a run, a few steps may have long answers"


@pytest.mark.parametrize(("unlearnable", "warned"), [(50.0, False), (51.0, True)])
def test_tokens_that_cannot_be_learned_from(unlearnable: float, warned: bool) -> None:
    texts = said(history(tokens__completion=100.0, tokens__unlearnable=unlearnable))
    assert bool(texts) is warned
    assert all("or set task.sampling=run" in text for text in texts)


def test_in_float32_a_token_that_differs_counts_at_the_newest_step() -> None:
    assert "mismatch_kl/max above 0.001" in said(history(mismatch_kl__max=2e-3))[0]
    assert said(history(mismatch_kl__max=2e-3), exact=False) == [], "bfloat16 alone makes such a mismatch"
    lines = history(mismatch_kl__max=2e-3)
    lines[-1]["mismatch_kl/max"] = 1e-9
    assert said(lines) == []


def test_a_mismatch_that_is_too_large_for_rounding() -> None:
    """5.24 was measured in a run that lost its pixels."""
    assert said(history(mismatch_kl__mean=0.03), exact=False) == []
    (text,) = said(history(mismatch_kl__mean=5.24), exact=False)
    assert "mismatch_kl/mean above 0.05" in text
    assert "mode=doctor" in text


def test_a_mismatch_of_stale_tokens_is_expected() -> None:
    assert said(history(mismatch_kl__max=0.5, mismatch_kl__mean=0.1, staleness__max=2.0)) == []
    assert len(said(history(mismatch_kl__max=0.5, staleness__max=0.0))) == 1


def test_a_mismatch_that_rises() -> None:
    lines = history(steps=20, mismatch_kl__mean=1e-3)
    assert said(lines, exact=False) == []
    for line in lines[-WINDOW:]:
        line["mismatch_kl/mean"] = 0.02
    (text,) = said(lines, exact=False)
    assert text.startswith("mismatch_kl/mean has grown more than 10-fold")
    assert "importance_correction" in text


def test_entropy_collapse_unless_solved() -> None:
    (text,) = said(history(entropy=0.001))
    assert "no longer explores" in text
    assert "lower trainer.learning_rate" in text
    assert said(history(entropy=0.001, reward__mean=0.97)) == []


# ── the blind control ───────────────────────────────────────────────────────────────────────────────────────


def climbing(*, blank: float, shuffled: float | None, climb: float = 0.3) -> list[Record]:
    """Twenty steps, with a blind control every five steps."""
    lines = history(steps=20)
    for line in lines:
        line["reward/mean"] = 0.1 + climb * line["step"] / 20
        if line["step"] % 5 == 1:
            line["vision_gap/blank"] = blank
            if shuffled is not None:
                line["vision_gap/shuffled"] = shuffled
    return lines


@pytest.mark.parametrize(("blank", "shuffled"), [(0.0, 0.0), (0.001, None), (0.3, 0.005), (-0.02, -0.001)])
def test_a_reward_that_climbs_blind(blank: float, shuffled: float | None) -> None:
    """`shuffled` decides: a grey image may change the answers just because it is new to the policy."""
    (text,) = said(climbing(blank=blank, shuffled=shuffled))
    assert text.startswith("The reward rises, but the policy ignores its images")
    for cause in ("blank or broken", "contain the answer", "guessing", "pixels arrive"):
        assert cause in text


def test_a_policy_that_looks_or_does_not_learn_yet_has_no_warning() -> None:
    assert said(climbing(blank=0.5, shuffled=0.5)) == []
    assert said(climbing(blank=0.0, shuffled=0.02)) == []
    assert said(climbing(blank=0.0, shuffled=0.0, climb=0.0)) == [], "early in a run, the policy ignores its images"
    once = climbing(blank=0.0, shuffled=0.0)
    for line in once[:-WINDOW]:
        line.pop("vision_gap/blank", None)
    assert said(once) == [], "one control may be chance"


def test_a_policy_that_begins_to_look_clears_it() -> None:
    lines = climbing(blank=0.0, shuffled=0.0)
    lines[-5]["vision_gap/shuffled"] = 0.4
    assert said(lines) == []


@pytest.mark.parametrize(
    ("limits", "is_found"),
    [
        (MonitorConfig(), True),
        (MonitorConfig(blind_rise=0.3), False),
        (MonitorConfig(blind_rise=0.2), True),
        (MonitorConfig(blind_gap=0.004), False),
        (MonitorConfig(blind_controls=4), True),
        (MonitorConfig(blind_controls=5), False),
    ],
)
def test_the_limits_of_the_guard(limits: MonitorConfig, is_found: bool) -> None:
    """From 0.145 in the first five steps to 0.37 in the last: a rise of 0.225. Four controls, each of 0.005 nats."""
    lines = climbing(blank=0.3, shuffled=0.005)
    assert is_blind(lines, limits) is is_found
    assert (warnings_for(lines, exact=True, config=limits) != []) is is_found
    silent = replace(limits, blind_guard=BlindGuard.none)
    assert warnings_for(lines, exact=True, config=silent) == []


def test_a_weight_that_reaches_no_turn() -> None:
    (text,) = said(history(vision_advantage__measured=0.0))
    assert "algorithm.vision_advantage.weight has had no effect" in text
    assert said(history(vision_advantage__measured=0.1)) == []


# ── waiting times ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        (["time/rollout"], "The trainer waits for rollouts"),
        (["time/engine_idle", "time/train"], "The engine waits for the trainer"),
    ],
)
def test_one_side_waits(keys: list[str], text: str) -> None:
    lines = history()
    for line in lines:
        line |= dict.fromkeys(keys, 1.7)
    assert said(lines)[0].startswith(text)
    assert "orchestrator.max_staleness=1" in said(lines)[0]
    assert said(lines[1:]) == []
    del lines[2][keys[0]]
    assert said(lines) == [], "no warning where a line lacks the key"


@pytest.mark.parametrize("key", ["time/engine_idle", "time/train"])
def test_an_engine_is_idle_or_a_trainer_busy_without_starving_it(key: str) -> None:
    lines = history()
    for line in lines:
        line[key] = 2.5
    assert said(lines) == []


def test_a_function_that_torch_no_longer_compiles() -> None:
    (text,) = said(history(compile__given_up=1.0))
    assert "runs further kinds uncompiled" in text
    assert "logs/main.log" in text


# ── texts ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_figures_that_are_not_finite_are_null_and_do_not_raise() -> None:
    keys = [key for key in history()[0] if key != "step"]
    nulls: list[Record] = [
        {"step": step, **dict.fromkeys(("vision_gap/blank", "vision_gap/shuffled", *keys))} for step in range(HISTORY)
    ]
    assert said(nulls) == []


def test_the_same_problem_has_the_same_text() -> None:
    first = said(history(rollouts__dropped=50.0, rollouts__dropped__fault=50.0, mismatch_kl__max=0.1))
    assert len(first) == 2
    assert first == said(history(rollouts__dropped=60.0, rollouts__dropped__fault=60.0, mismatch_kl__max=0.2))
