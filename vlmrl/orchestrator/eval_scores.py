"""Scores of an evaluation set: avg@k, pass@k and maj@k with standard errors, and the differences of two evaluations.

Everything here works on `Asked`: one problem with the rewards of its sampled answers and of its greedy answer.

    avg@k    mean reward of the sampled answers
    pass@k   probability that one of k answers passes; unbiased from n ≥ k answers (arXiv 2107.03374, eq. 1)
    maj@k    probability that the most frequent answer passes (self-consistency, arXiv 2203.11171)

An answer passes where its reward is at least `pass_at`, less `PASS_TOLERANCE`: a sum of weighted terms may miss 1 by
rounding. Answers to one problem are not independent, so standard errors are clustered by problem (arXiv 2411.00640,
eq. 4).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vlmrl.config.eval_set import ks
from vlmrl.record.evaluation import Asked, Mean

PASS_TOLERANCE = 1e-6


def passes(reward: float, pass_at: float) -> bool:
    """Whether an answer with this reward has passed.

    >>> passes(0.7 + 0.2 + 0.1, 1.0), passes(0.99, 1.0)
    (True, False)
    """
    return reward >= pass_at - PASS_TOLERANCE


def clustered_mean(values: Sequence[float], clusters: Sequence[str]) -> Mean:
    """The mean of `values` and its standard error, clustered.

    The variance of the mean is the sum over clusters of the squared sum of their deviations, over n² (arXiv 2411.00640,
    eq. 4), times G / (G − 1) for G clusters, which makes it the usual estimate where each cluster has one value.

    >>> clustered_mean([0.0, 1.0, 1.0, 0.0], ["a", "b", "c", "d"])  # sqrt(1/3 / 4)
    Mean(value=0.5, se=0.28867513459481287, problems=4)
    >>> clustered_mean([0.0, 0.0, 1.0, 1.0], ["a", "a", "b", "b"])  # two problems, not four
    Mean(value=0.5, se=0.5, problems=2)
    """
    array = np.asarray(values, np.float64)
    mean = float(array.mean())
    names = {name: number for number, name in enumerate(dict.fromkeys(clusters))}
    sums = np.bincount([names[name] for name in clusters], array - mean, len(names))
    count = len(names)
    if count < 2:
        return Mean(mean, None, count)
    return Mean(mean, math.sqrt(float((sums**2).sum()) * count / (count - 1)) / len(array), count)


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Probability that at least one of `k` answers passes, estimated without bias from `samples` answers of which
    `passed` passed: 1 − C(n − c, k) / C(n, k) (arXiv 2107.03374, eq. 1).

    >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 2), pass_at_k(4, 2, 3), pass_at_k(4, 0, 4)
    (0.25, 0.5, 1.0, 0.0)
    """
    assert 1 <= k <= samples
    if samples - passed < k:
        return 1.0
    ratio = 1.0
    for missing in range(samples - passed - k + 1, samples - passed + 1):
        ratio *= missing / (missing + passed)
    return 1.0 - ratio


def majority(answers: Sequence[str | None], passed: Sequence[bool]) -> float:
    """Probability that the most frequent answer passes.

    An answer that is None has no vote; where all are None, the result is 0. Equally frequent answers share the result,
    as if one of them were drawn at random. Equal answers that do not all pass (because of a reward for the form) count
    by the share of them that does.

    >>> majority(["4", "5", "4", None], [True, False, True, False]), majority(["4", "5"], [True, False])
    (1.0, 0.5)
    """
    votes: dict[str, list[bool]] = {}
    for answer, has_passed in zip(answers, passed, strict=True):
        if answer is not None:
            votes.setdefault(answer, []).append(has_passed)
    most = max(map(len, votes.values()), default=0)
    shares = [sum(each) / len(each) for each in votes.values() if len(each) == most]
    return sum(shares) / len(shares) if shares else 0.0


def scores(asked: Sequence[Asked], pass_at: float) -> dict[str, Mean]:
    """The scores of a set by name: `reward` (avg@k), `pass@k`, `maj@k`, `reward_greedy`, `pass_greedy`."""
    found: dict[str, Mean] = {}
    sampled = [problem for problem in asked if problem.rewards]
    if sampled:
        pairs = [(reward, problem.problem_id) for problem in sampled for reward in problem.rewards]
        found["reward"] = clustered_mean([reward for reward, _ in pairs], [name for _, name in pairs])
        names = [problem.problem_id for problem in sampled]
        passed = [[passes(reward, pass_at) for reward in problem.rewards] for problem in sampled]
        fewest = min(map(len, passed))
        for k in ks(fewest):
            estimates = [pass_at_k(len(each), sum(each), k) for each in passed]
            found[f"pass@{k}"] = clustered_mean(estimates, names)
        if fewest > 1 and all(len(problem.answers) == len(problem.rewards) for problem in sampled):
            votes = [majority(problem.answers, each) for problem, each in zip(sampled, passed, strict=True)]
            found[f"maj@{fewest}"] = clustered_mean(votes, names)
    greedy = [(problem.greedy, problem.problem_id) for problem in asked if problem.greedy is not None]
    if greedy:
        names = [name for _, name in greedy]
        found["reward_greedy"] = clustered_mean([reward for reward, _ in greedy], names)
        found["pass_greedy"] = clustered_mean([float(passes(reward, pass_at)) for reward, _ in greedy], names)
    return found


# ── results by column ───────────────────────────────────────────────────────────────────────────────────────

MAX_VALUES = 32
"""Values of a column that are shown by themselves: the most frequent ones."""
OTHER = "(other)"
"""The rest of them."""
NO_VALUE = "(none)"
"""A problem that has no such column, or null in it."""
MAX_VALUE_LENGTH = 60


def shown_value(value: object) -> str:
    """A value of a column as a part of a metric's key: one line, short, without slashes.

    >>> shown_value("bar/line chart"), shown_value(None), shown_value(3), shown_value(" a\\nb ")
    ('bar∕line chart', '(none)', '3', 'a b')
    """
    text = NO_VALUE if value is None else " ".join(str(value).split())
    return text.replace("/", "∕")[:MAX_VALUE_LENGTH] or NO_VALUE


def by_value(asked: Sequence[Asked], column: str) -> dict[str, list[Asked]]:
    """The problems by their value of a column, the most frequent first, at most `MAX_VALUES` and `OTHER`."""
    groups: dict[str, list[Asked]] = {}
    for problem in asked:
        groups.setdefault(problem.columns.get(column, NO_VALUE), []).append(problem)
    ordered = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    found = dict(ordered[:MAX_VALUES])
    rest = [problem for _, members in ordered[MAX_VALUES:] for problem in members]
    return found | ({OTHER: rest} if rest else {})


# ── two evaluations ─────────────────────────────────────────────────────────────────────────────────────────

RESAMPLES = 10_000
"""Bootstrap samples behind an interval."""
CONFIDENCE = 0.95
MAX_COUNTS = 10_000_000
"""Numbers in memory at once."""


@dataclass(frozen=True)
class Difference:
    """How much better the second of two evaluations is."""

    value: float
    low: float | None
    high: float | None
    """Ends of the 95 % interval; None where there are fewer than two problems."""
    p: float | None
    """Two-sided p-value: McNemar's exact test where every score is 0 or 1, else the sign of the bootstrap."""
    test: str
    """`McNemar` or `bootstrap`."""
    problems: int
    """Problems that both have."""


def paired(first: Mapping[str, float], second: Mapping[str, float]) -> Difference:
    """Compare the score of each problem that two evaluations share, by problem id.

    The interval is a percentile interval of the paired bootstrap: problems are drawn with replacement, each with both
    of its scores (Efron and Tibshirani 1993, ch. 13; Koehn 2004 for two systems on one test set). Its random numbers
    have a fixed seed.

    >>> paired({"a": 0.0, "b": 0.5}, {"a": 1.0, "b": 0.5, "c": 0.0}).value
    0.5
    """
    names = [name for name in first if name in second]
    before = np.array([first[name] for name in names], np.float64)
    after = np.array([second[name] for name in names], np.float64)
    difference = after - before
    count = len(names)
    mean = float(difference.mean()) if count else 0.0
    is_binary = bool(count) and bool(np.isin(before, (0, 1)).all() and np.isin(after, (0, 1)).all())
    test = "McNemar" if is_binary else "bootstrap"
    if count < 2:
        return Difference(mean, None, None, None, test, count)
    means = bootstrap_means(difference)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    if is_binary:
        p = mcnemar(int((difference > 0).sum()), int((difference < 0).sum()))
    else:
        p = min(1.0, 2 * float(min((means <= 0).mean(), (means >= 0).mean())))
        p = max(p, 1 / RESAMPLES)  # no bootstrap tells less
    return Difference(mean, float(low), float(high), p, test, count)


def bootstrap_means(values: np.ndarray) -> np.ndarray:
    """float64 [RESAMPLES]; means of samples with replacement, of the same size."""
    random = np.random.Generator(np.random.Philox(key=0))
    distinct, counts = np.unique(values, return_counts=True)
    # Which problems have a value does not matter, so count how often each value is drawn: a few numbers for rewards of
    # 0 and 1. In pieces, because a reward with many values has as many counts as problems.
    rows = max(1, MAX_COUNTS // len(distinct))
    sizes = [min(rows, RESAMPLES - start) for start in range(0, RESAMPLES, rows)]
    shares = counts / counts.sum()
    drawn = [random.multinomial(len(values), shares, size=size) @ distinct for size in sizes]
    return np.asarray(np.concatenate(drawn) / len(values))


def mcnemar(better: int, worse: int) -> float:
    """Two-sided exact p-value of McNemar's test: `better` and `worse` problems changed, and half of them would have
    gone either way (McNemar 1947; the exact form is a binomial test).

    >>> mcnemar(0, 0), mcnemar(5, 0), round(mcnemar(8, 2), 6)
    (1.0, 0.0625, 0.109375)
    """
    changed, ways, tail = better + worse, 1, 0
    for count in range(min(better, worse) + 1):
        tail += ways  # the binomial coefficient of `changed` over `count`
        ways = ways * (changed - count) // (count + 1)
    return float(min(1.0, 2 * tail / 2**changed))
