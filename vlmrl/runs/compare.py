"""Set evaluations side by side, for mode=compare: each score with its interval, and the difference to the first run.

    evaluation.json of mode=eval, or the newest recorded evaluation of a training run ─▶ Scored ─▶ text, JSON, HTML

Two runs are compared on the problems that both were asked, by problem id, because the problems of a set differ much
more from each other than two policies do (arXiv 2411.00640, section 4.2). `eval_scores.paired` says how.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from statistics import NormalDist, fmean
from typing import Any

from vlmrl.orchestrator.eval_scores import CONFIDENCE, Difference, clustered_mean, paired, pass_at_k, passes
from vlmrl.record.evaluation import Asked, Evaluation, SetResult, evaluation_of
from vlmrl.record.run_dir import RunDir

Z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
"""Standard errors on each side of a mean in its interval."""

HEAD = ("set", "score", "run", "value", "95 % interval", "problems", "difference", "95 % interval", "p", "shared")


@dataclass(frozen=True)
class Scored:
    """One score of one run on one set."""

    set: str
    score: str
    """`reward` (avg@k), `pass@k`, `reward_greedy`."""
    run: str
    value: float
    low: float | None
    high: float | None
    """Ends of the 95 % interval."""
    problems: int
    difference: Difference | None
    """To the first run that has this set; None for that run."""


def read_evaluations(runs: Sequence[RunDir], names: Sequence[str]) -> dict[str, Evaluation]:
    """The evaluation of each run that has one, by the run's name. Raises VlmrlError where a file is damaged."""
    found: dict[str, Evaluation] = {}
    for run, name in zip(runs, names, strict=True):
        evaluation = evaluation_of(run) if run.config.exists() else None
        if evaluation is not None:
            is_shared = names.count(name) > 1  # of the folders eval/ in several runs
            label = f"{run.path.parent.name}/{name}" if is_shared else name
            while label in found:
                label += "'"
            found[label] = evaluation
    return found


def compared(evaluations: Mapping[str, Evaluation]) -> list[Scored]:
    """Every score that at least one run has, set by set."""
    sets = dict.fromkeys(result.name for each in evaluations.values() for result in each.sets)
    rows: list[Scored] = []
    for name in sets:
        results = {
            run: result
            for run, each in evaluations.items()
            for result in each.sets
            if result.name == name and result.asked
        }
        rows += _compared_set(name, results)
    return rows


def _compared_set(name: str, results: Mapping[str, SetResult]) -> Iterator[Scored]:
    samples = min((len(asked.rewards) for result in results.values() for asked in result.asked), default=0)
    for score in ("reward", f"pass@{samples}", "reward_greedy"):
        if score == "pass@0" or (score == "pass@1" and _is_repeated(results)):
            continue
        first: dict[str, float] | None = None
        for run, result in results.items():
            pairs = [
                (asked.problem_id, value) for asked in result.asked for value in _values(score, samples, result, asked)
            ]
            if not pairs:
                continue
            mean = clustered_mean([value for _, value in pairs], [problem for problem, _ in pairs])
            own = _by_problem(pairs)
            half = None if mean.se is None else Z * mean.se
            yield Scored(
                name,
                score,
                run,
                mean.value,
                None if half is None else mean.value - half,
                None if half is None else mean.value + half,
                mean.problems,
                None if first is None else paired(first, own),
            )
            first = own if first is None else first


def _is_repeated(results: Mapping[str, SetResult]) -> bool:
    """Whether pass@1 is the mean reward, because every reward is 0 or 1."""
    return all(reward in (0.0, 1.0) for each in results.values() for asked in each.asked for reward in asked.rewards)


def _values(score: str, samples: int, result: SetResult, asked: Asked) -> Sequence[float]:
    if score == "reward":
        return asked.rewards
    if score == "reward_greedy":
        return () if asked.greedy is None else (asked.greedy,)
    return (pass_at_k(len(asked.rewards), sum(passes(reward, result.pass_at) for reward in asked.rewards), samples),)


def _by_problem(pairs: Sequence[tuple[str, float]]) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for problem, value in pairs:
        found.setdefault(problem, []).append(value)
    return {problem: fmean(values) for problem, values in found.items()}


# ── text, JSON and HTML ─────────────────────────────────────────────────────────────────────────────────────


def cells(row: Scored) -> list[str]:
    """A row as text."""
    difference = row.difference
    own = [row.set, row.score, row.run, f"{row.value:.3f}", _interval(row.low, row.high, ""), str(row.problems)]
    if difference is None:
        return [*own, "-", "-", "-", "-"]
    if not difference.problems:
        return [*own, "-", "-", "-", "no problem in common"]
    shared = f"{difference.problems} of {row.problems}" if difference.problems != row.problems else "all"
    return [
        *own,
        f"{difference.value:+.3f}",
        _interval(difference.low, difference.high, "+"),
        "-" if difference.p is None else f"{difference.p:.3g} ({difference.test})",
        shared,
    ]


def _interval(low: float | None, high: float | None, sign: str) -> str:
    return "-" if low is None or high is None else f"[{low:{sign}.3f}, {high:{sign}.3f}]"


def as_text(rows: Sequence[Scored]) -> str:
    """The table in columns of fixed width; "" without rows."""
    if not rows:
        return ""
    lines = [list(HEAD), *map(cells, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = "".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() + "\n" for line in lines
    )
    return f"evaluations; differences to the first run of a set, paired by problem\n{table}"


def as_json(rows: Sequence[Scored]) -> dict[str, Any]:
    """The numbers in full."""
    return {"confidence": CONFIDENCE, "scores": [dataclasses.asdict(row) for row in rows]}


def as_html(rows: Sequence[Scored]) -> str:
    """A table with a plot of the intervals; "" without rows."""
    if not rows:
        return ""
    head = "".join(f"<th>{escape(name)}</th>" for name in (*HEAD, ""))
    body = ""
    for row, scale in zip(rows, _scales(rows), strict=True):
        texts = "".join(f"<td>{escape(text)}</td>" for text in cells(row))
        body += f"<tr>{texts}<td>{_whisker(row, *scale)}</td></tr>\n"
    return (
        "<h2>Evaluations</h2>\n<p>95 % intervals, clustered by problem. Differences to the first run of a set, paired "
        f"by problem.</p>\n<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>"
    )


def _scales(rows: Sequence[Scored]) -> Iterator[tuple[float, float]]:
    """The lowest and the highest end of an interval of a row's set and score."""
    for row in rows:
        same = [other for other in rows if (other.set, other.score) == (row.set, row.score)]
        ends = [end for other in same for end in (other.low, other.high, other.value) if end is not None]
        yield min(ends), max(ends)


def _whisker(row: Scored, lowest: float, highest: float) -> str:
    """A row's mean and interval as a picture of 160 × 16 pixels."""

    def at(value: float) -> float:
        return 80.0 if highest == lowest else 5 + 150 * (value - lowest) / (highest - lowest)

    low, high = (row.value if end is None else end for end in (row.low, row.high))
    return (
        f'<svg width="160" height="16" role="img" aria-label="{row.value:.3f}">'
        f'<line x1="{at(low):.1f}" x2="{at(high):.1f}" y1="8" y2="8" stroke="currentColor"/>'
        f'<circle cx="{at(row.value):.1f}" cy="8" r="4"/></svg>'
    )
