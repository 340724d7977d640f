"""avg@k, pass@k, maj@k, standard errors and paired comparisons, against enumeration and hand-computed values."""

from __future__ import annotations

import itertools
import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmrl.orchestrator.eval_scores import (
    MAX_VALUES,
    OTHER,
    bootstrap_means,
    by_value,
    clustered_mean,
    majority,
    mcnemar,
    paired,
    pass_at_k,
    passes,
    scores,
    shown_value,
)
from vlmrl.record.evaluation import Asked


@pytest.mark.parametrize("samples", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets_with_a_pass(samples: int) -> None:
    """The definition of the Codex paper: of all subsets of k answers, those with at least one that passes."""
    for passed in range(samples + 1):
        answers = [index < passed for index in range(samples)]
        for k in range(1, samples + 1):
            subsets = list(itertools.combinations(answers, k))
            assert pass_at_k(samples, passed, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_of_many_answers_does_not_overflow() -> None:
    exact = 1 - math.comb(9000, 4000) / math.comb(10000, 4000)
    assert pass_at_k(10000, 1000, 4000) == pytest.approx(exact)
    assert pass_at_k(10000, 3, 100) == pytest.approx(1 - math.comb(9997, 100) / math.comb(10000, 100))


@pytest.mark.parametrize(
    ("answers", "passed", "expected"),
    [
        (["4"], [True], 1.0),
        (["4", "5", "4"], [True, False, True], 1.0),
        (["5", "5", "4"], [False, False, True], 0.0),
        (["4", "5"], [True, False], 0.5),  # a tie: as if drawn at random
        (["4", "5", "6"], [True, False, False], 1 / 3),
        ([None, None, "4"], [False, False, True], 1.0),  # no answer, no vote
        ([None, None], [False, False], 0.0),
        (["4", "4", "5"], [True, False, False], 0.5),  # equal answers, of which one fails in its form
    ],
)
def test_majority(answers: list[str | None], passed: list[bool], expected: float) -> None:
    assert majority(answers, passed) == pytest.approx(expected)


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=20))
def test_one_value_per_problem_gives_the_usual_standard_error(values: list[float]) -> None:
    mean = clustered_mean(values, [str(number) for number in range(len(values))])
    assert mean.value == pytest.approx(statistics.fmean(values), abs=1e-9)
    assert mean.se == pytest.approx(statistics.stdev(values) / math.sqrt(len(values)), abs=1e-9)


def test_clusters_of_one_size_are_their_means() -> None:
    """With as many answers per problem, the clustered error is that of the problems' means (arXiv 2411.00640)."""
    random = np.random.default_rng(0)
    table = random.random((30, 8))
    mean = clustered_mean(table.ravel().tolist(), [str(row) for row in range(30) for _ in range(8)])
    assert mean.value == pytest.approx(table.mean())
    assert mean.se == pytest.approx(table.mean(1).std(ddof=1) / math.sqrt(30))
    assert mean.problems == 30


def test_a_single_problem_has_no_standard_error() -> None:
    assert clustered_mean([0.0, 1.0], ["a", "a"]).se is None


def test_the_scores_of_a_set() -> None:
    asked = [
        Asked("a", (1.0, 0.0, 1.0, 1.0), ("x", "y", "x", "x"), greedy=1.0),
        Asked("b", (0.0, 0.0, 0.0, 0.5), ("p", "q", "q", None), greedy=0.0),
    ]
    found = scores(asked, pass_at=1.0)
    assert list(found) == ["reward", "pass@1", "pass@2", "pass@4", "maj@4", "reward_greedy", "pass_greedy"]
    assert found["reward"].value == pytest.approx(3.5 / 8)
    assert found["reward"].se == pytest.approx(abs(0.75 - 0.125) / 2)
    assert found["pass@1"].value == pytest.approx(0.75 / 2)
    assert found["pass@2"].value == pytest.approx(0.5)  # C(1,2) = 0 ways to miss all three
    assert found["maj@4"].value == pytest.approx(0.5)
    assert found["reward_greedy"].value == 0.5
    assert scores(asked, pass_at=0.5)["pass@1"].value == pytest.approx((0.75 + 0.25) / 2)


def test_a_set_without_sampled_answers_has_greedy_scores_only() -> None:
    assert list(scores([Asked("a", (), greedy=1.0)], 1.0)) == ["reward_greedy", "pass_greedy"]
    assert scores([], 1.0) == {}


def test_rounding_does_not_fail_an_answer() -> None:
    assert 0.7 + 0.2 + 0.1 < 1
    assert passes(0.7 + 0.2 + 0.1, 1.0)
    assert not passes(1 - 1e-4, 1.0)


def test_the_number_of_values_of_a_column_is_bounded() -> None:
    asked = [Asked(str(i), (1.0,), columns={"c": str(i % 50)}) for i in range(75)] + [Asked("none", (0.0,))]
    found = by_value(asked, "c")
    assert len(found) == MAX_VALUES + 1
    assert list(found)[:3] == ["0", "1", "10"]  # two problems each, in the order of their text
    assert sum(map(len, found.values())) == 76
    assert len(found[OTHER]) == 76 - 2 * 25 - 7
    assert shown_value("x" * 1000) == "x" * 60


# ── comparisons ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("better", "worse", "p"),
    [(0, 0, 1.0), (1, 0, 1.0), (5, 0, 2 / 32), (0, 10, 2 / 1024), (8, 2, 2 * (1 + 10 + 45) / 1024), (6, 6, 1.0)],
)
def test_mcnemars_exact_p_value(better: int, worse: int, p: float) -> None:
    assert mcnemar(better, worse) == mcnemar(worse, better) == pytest.approx(p)


def test_many_changed_problems_are_counted_exactly() -> None:
    normal = 2 * statistics.NormalDist().cdf((9800 + 0.5 - 10000) / math.sqrt(20000 / 4))
    assert mcnemar(9800, 10200) == pytest.approx(normal, rel=1e-2)


def test_the_interval_is_that_of_the_normal_distribution_for_many_problems() -> None:
    random = np.random.default_rng(1)
    first = {str(i): float(value) for i, value in enumerate(random.random(4000))}
    second = {name: value + float(random.normal(0.05, 0.3)) for name, value in first.items()}
    difference = np.array([second[name] - first[name] for name in first])
    se = difference.std(ddof=1) / math.sqrt(4000)
    found = paired(first, second)
    assert found.test == "bootstrap"
    assert found.value == pytest.approx(difference.mean())
    assert found.low == pytest.approx(difference.mean() - 1.96 * se, abs=0.15 * se)
    assert found.high == pytest.approx(difference.mean() + 1.96 * se, abs=0.15 * se)
    assert found.p is not None
    assert found.p < 0.001


def test_only_shared_problems_are_compared() -> None:
    found = paired({"a": 0.0, "b": 1.0, "c": 1.0}, {"b": 1.0, "a": 1.0, "z": 0.0})
    assert (found.value, found.problems, found.test) == (0.5, 2, "McNemar")
    nothing = paired({"a": 0.0}, {"b": 1.0})
    assert (nothing.problems, nothing.low, nothing.p) == (0, None, None)


def test_equal_evaluations_do_not_differ() -> None:
    scores_of = {str(i): i % 3 / 3 for i in range(50)}
    found = paired(scores_of, dict(scores_of))
    assert (found.value, found.low, found.high, found.p) == (0.0, 0.0, 0.0, 1.0)


def test_pairing_finds_what_two_intervals_do_not() -> None:
    """Problems differ much, the two policies little but always in the same direction."""
    first = {str(i): i / 100 for i in range(100)}
    second = {name: value + 0.01 for name, value in first.items()}
    found = paired(first, second)
    assert found.low is not None
    assert found.low > 0.009
    assert np.std(list(first.values())) / 10 > 0.02


def test_the_bootstrap_repeats_and_works_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(2).random(40)
    whole = bootstrap_means(values)
    assert np.array_equal(whole, bootstrap_means(values))
    assert len(whole) == 10_000
    monkeypatch.setattr("vlmrl.orchestrator.eval_scores.MAX_COUNTS", 4000)
    assert len(bootstrap_means(values)) == 10_000
    assert bootstrap_means(values).mean() == pytest.approx(values.mean(), abs=0.005)
