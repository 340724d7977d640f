"""Evaluations side by side: intervals, paired differences, and problems that are not shared."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from scipy.stats import binomtest  # type: ignore[import-untyped]

from support.rollout_builders import rollout
from vlmrl.errors import VlmrlError
from vlmrl.record.evaluation import MAIN, Asked, Evaluation, SetResult, evaluation_of, write_evaluation
from vlmrl.record.rollouts import RolloutRecorder
from vlmrl.record.run_dir import RunDir
from vlmrl.runs.compare import as_html, as_json, as_text, compared, read_evaluations
from vlmrl.types import Rollout


def evaluation(name: str, rewards: dict[str, tuple[float, ...]], greedy: float | None = None) -> Evaluation:
    asked = tuple(Asked(problem, values, greedy=greedy) for problem, values in rewards.items())
    return Evaluation("m", 3, (SetResult(name, 1.0, asked),))


def test_each_score_has_its_interval_and_its_difference() -> None:
    first = evaluation("ood", {"a": (0.0, 0.0), "b": (1.0, 0.0), "c": (0.0, 0.5)}, greedy=0.0)
    second = evaluation("ood", {"a": (1.0, 1.0), "b": (1.0, 0.0), "d": (0.0, 0.0)}, greedy=1.0)
    rows = compared({"one": first, "two": second})
    assert [(row.score, row.run) for row in rows] == [
        *(("reward", "one"), ("reward", "two"), ("pass@2", "one"), ("pass@2", "two")),
        *(("reward_greedy", "one"), ("reward_greedy", "two")),
    ]
    reward = rows[1]
    assert reward.value == pytest.approx(0.5)
    assert reward.low == pytest.approx(0.5 - 1.959964 * 0.5 / math.sqrt(3), abs=1e-4)
    assert reward.difference is not None
    assert (reward.difference.value, reward.difference.problems) == (0.5, 2)  # a: +1, b: 0
    assert rows[0].difference is None
    assert rows[3].value == pytest.approx(2 / 3)
    text = as_text(rows)
    assert "2 of 3" in text
    assert "+0.500" in text


def test_evaluations_without_a_problem_in_common_are_not_compared() -> None:
    rows = compared({"one": evaluation("s", {"a": (1.0,)}), "two": evaluation("s", {"b": (0.0,)})})
    assert "no problem in common" in as_text(rows)
    found = rows[1].difference
    assert found is not None
    assert (found.problems, found.p) == (0, None)
    assert as_text([]) == as_html([]) == ""


def test_greedy_answers_of_0_and_1_are_compared_by_mcnemar() -> None:
    one = Evaluation("m", 0, (SetResult("s", 1.0, tuple(Asked(str(i), (), greedy=0.0) for i in range(9))),))
    two = Evaluation("m", 0, (SetResult("s", 1.0, tuple(Asked(str(i), (), greedy=1.0) for i in range(9))),))
    rows = compared({"one": one, "two": two})
    assert [row.score for row in rows] == ["reward_greedy"] * 2
    difference = rows[1].difference
    assert difference is not None
    assert (difference.test, difference.p) == ("McNemar", 2 / 512)
    assert as_json(rows)["scores"][1]["difference"]["p"] == 2 / 512
    assert as_html(rows).count("<svg") == 2


def test_a_file_of_mode_eval_comes_back(tmp_path: Path) -> None:
    written = evaluation("ood", {"a": (0.0, 0.5)}, greedy=1.0)
    run = RunDir(tmp_path / "run")
    run.create()
    write_evaluation(run.path / "evaluation.json", written)
    assert evaluation_of(run) == written
    (run.path / "evaluation.json").write_text('{"model": "m"}')
    with pytest.raises(VlmrlError, match=r"evaluation\.json is no evaluation that mode=eval wrote .*evaluate again"):
        evaluation_of(run)


def test_runs_that_were_evaluated_while_they_trained(tmp_path: Path) -> None:
    """Their newest evaluation is read from its rollouts; folders of the same name are told apart."""
    for name in ("a", "b"):
        run = RunDir(tmp_path / name / "eval")
        run.create()
        run.config.write_text(OmegaConf.to_yaml({"orchestrator": {"eval": {"sets": {"ood": {"pass_at": 0.5}}}}}))
        recorder = RolloutRecorder(run)
        for step in (0, 3):
            recorder.write(
                step,
                {
                    "eval_sampled": [_played(f"eval/{step:06d}/0{i}/00", f"p{i}", i / 2) for i in range(3)],
                    "eval_greedy": [_played(f"eval-greedy/{step:06d}/0{i}/00", f"p{i}", 1.0) for i in range(3)],
                    "eval_ood_sampled": [_played(f"eval_ood/{step:06d}/00/0{i}", "q", i / 4) for i in range(4)],
                },
            )
        recorder.close()
    runs = [RunDir(tmp_path / name / "eval") for name in ("a", "b")]
    found = read_evaluations(runs, ["eval", "eval"])
    assert list(found) == ["a/eval", "b/eval"]
    main, ood = found["a/eval"].sets
    assert found["a/eval"].step == 3
    assert (main.name, main.pass_at, [(a.problem_id, a.rewards, a.greedy) for a in main.asked]) == (
        MAIN,
        1.0,
        [("p0", (0.0,), 1.0), ("p1", (0.5,), 1.0), ("p2", (1.0,), 1.0)],
    )
    assert (ood.name, ood.pass_at, ood.asked) == ("ood", 0.5, (Asked("q", (0.0, 0.25, 0.5, 0.75)),))


@pytest.mark.parametrize("is_binary", [True, False])
def test_intervals_and_tests_equal_an_independent_computation(is_binary: bool, tmp_path: Path) -> None:
    """On recorded rollouts: numpy's bootstrap of problems with both of their scores, scipy's binomial test, and the
    closed form of the clustered standard error. The second run lacks one problem, and has another."""
    random = np.random.default_rng(3)
    problems, samples = 40, 1 if is_binary else 4
    rewards = random.random((2, problems, samples)) * np.linspace(0.2, 1, problems)[:, None] + [[[0.0]], [[0.15]]]
    if is_binary:
        rewards = (rewards > 0.45).astype(float)
    runs = [RunDir(tmp_path / name) for name in ("a", "b")]
    for number, run in enumerate(runs):
        run.create()
        run.config.write_text(OmegaConf.to_yaml({}))
        recorder = RolloutRecorder(run)
        played = [
            _played(f"eval/000003/{i:02d}/{k:02d}", f"p{i + number}", float(rewards[number, i, k]))
            for i in range(problems)
            for k in range(samples)
        ]
        recorder.write(3, {"eval_sampled": played})
        recorder.close()
    rows = [row for row in compared(read_evaluations(runs, ["a", "b"])) if row.score == "reward"]
    for row, values in zip(rows, rewards, strict=True):
        means = values.mean(axis=1)
        half = 1.959963985 * means.std(ddof=1) / np.sqrt(problems)
        assert (row.value, row.low, row.high) == pytest.approx((means.mean(), means.mean() - half, means.mean() + half))
    change = rewards[1, :-1].mean(axis=1) - rewards[0, 1:].mean(axis=1)  # p1 to p39
    means = random.choice(change, (40_000, len(change))).mean(axis=1)
    found = rows[1].difference
    assert found is not None
    assert found.problems == problems - 1
    assert found.value == pytest.approx(change.mean())
    tolerance = 1.01 / (problems - 1) if is_binary else 0.01
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=tolerance)
    if is_binary:
        better, worse = int((change > 0).sum()), int((change < 0).sum())
        assert found.p == pytest.approx(binomtest(better, better + worse).pvalue)
    else:
        assert found.p == pytest.approx(2 * min((means <= 0).mean(), (means >= 0).mean()), abs=0.01)
    assert found.test == ("McNemar" if is_binary else "bootstrap")


def _played(name: str, problem: str, reward: float) -> Rollout:
    played = rollout()
    played.rollout_id, played.problem_id, played.reward = name, problem, reward
    return played
