"""`mode=compare`, and the end of every sweep: one table across runs, as text and CSV; page.py makes the plot and HTML.

    folders ─▶ runs_in ─▶ config.yaml, metrics.jsonl, summary.json ─▶ a Row each ─▶ compare.txt, .csv, .png, .html

Runs that are not over, or never began, have their row as well: the table is whole at any time.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from vlmrl.cli.sweep.jobs import runs_in, state_of
from vlmrl.record.files import disk_errors, write_bytes_atomically
from vlmrl.record.metrics import ELAPSED, EVAL_GREEDY, EVAL_SAMPLED, Record, read_metrics
from vlmrl.record.run_dir import RunDir

THROUGHPUT, MISMATCH_MEAN, MISMATCH_MAX = "throughput/tokens_per_s", "mismatch_kl/mean", "mismatch_kl/max"

COLUMNS: dict[str, tuple[str, str]] = {
    "job": ("what the run is called: the overrides in which it differs, or its folder", ""),
    "state": ("new, running, stopped, killed, failed, finished", ""),
    "step": ("optimizer steps so far", "{:d}"),
    EVAL_SAMPLED: ("held-out reward under sampling, at the last evaluation", "{:.3f}"),
    EVAL_GREEDY: ("the same under greedy decoding", "{:.3f}"),
    "reward/mean": ("of the last step's rollouts", "{:.3f}"),
    "seconds_to_target": ("seconds until orchestrator.eval.target was reached; none where it was not", "{:.0f}"),
    "seconds": ("wall-clock so far", "{:.0f}"),
    THROUGHPUT: ("median over the steps", "{:.0f}"),
    MISMATCH_MEAN: ("mean over the steps", "{:.1e}"),
    MISMATCH_MAX: ("highest of all steps", "{:.1e}"),
}
"""Column → what it says, and how the text shows it. The CSV has the figures in full."""


@dataclass(frozen=True)
class Row:
    """One run."""

    run_dir: RunDir
    figures: Mapping[str, Any]
    """By column; None where there is none (yet)."""
    curve: tuple[tuple[float, ...], tuple[float, ...]]
    """Seconds and held-out sampled reward of each evaluation."""


def compare(folders: Sequence[str | Path], into: Path) -> list[Row]:
    """Write compare.txt, compare.csv, compare.png and compare.html into a folder that exists.

    Raises ConfigError where a folder holds no run, VlmrlError where the files cannot be read or written.
    """
    from vlmrl.cli.sweep.page import page, plot  # matplotlib takes its time to import

    rows = read_rows([run for folder in folders for run in runs_in(Path(folder))])
    picture = plot(rows)
    files = {
        "txt": as_text(rows).encode(),
        "csv": as_csv(rows).encode(),
        "png": picture,
        "html": page(rows, picture, into).encode(),
    }
    for ending, content in files.items():
        path = into / f"compare.{ending}"
        with disk_errors(path):
            write_bytes_atomically(path, content)
    return rows


def read_rows(runs: Sequence[RunDir]) -> list[Row]:
    """One row per run, in the order of `runs`. Raises VlmrlError where a run's files are damaged."""
    return [_row(run, name) for run, name in zip(runs, names(runs), strict=True)]


def names(runs: Sequence[RunDir]) -> list[str]:
    """What to call each run: the overrides that not all of them have, where they are jobs; else the folder."""
    overrides = [run.read_overrides() for run in runs]
    jobs = [set(job) for job in overrides if job is not None]
    common = set.intersection(*jobs) if jobs else set()
    own = [[text for text in job or () if text not in common] for job in overrides]
    return [" ".join(texts) or run.name for run, texts in zip(runs, own, strict=True)]


def _row(run: RunDir, name: str) -> Row:
    metrics = read_metrics(run.metrics) if run.metrics.exists() else []
    evaluations = [line for line in metrics if line.get(EVAL_SAMPLED) is not None]
    steps = [line for line in metrics if THROUGHPUT in line]
    summary = run.read_summary() or {}
    last = metrics[-1] if metrics else {}
    figures = {
        "job": name,
        "state": state_of(run).value,
        "step": last.get("step"),
        EVAL_SAMPLED: evaluations[-1][EVAL_SAMPLED] if evaluations else None,
        EVAL_GREEDY: evaluations[-1].get(EVAL_GREEDY) if evaluations else None,
        "reward/mean": steps[-1].get("reward/mean") if steps else None,
        "seconds_to_target": seconds_to_target(evaluations, *_target(run)),
        "seconds": summary.get("wall_clock_s", last.get(ELAPSED)),
        THROUGHPUT: _over(median, steps, THROUGHPUT),
        MISMATCH_MEAN: _over(fmean, steps, MISMATCH_MEAN),
        MISMATCH_MAX: _over(max, steps, MISMATCH_MAX),
    }
    curve = tuple(line[ELAPSED] for line in evaluations), tuple(line[EVAL_SAMPLED] for line in evaluations)
    return Row(run, figures, curve)


def _target(run: RunDir) -> tuple[float | None, int]:
    """`orchestrator.eval.target` and `.consecutive` of the run; no target of one that has not begun."""
    if not run.config.exists():
        return None, 1
    evaluation = run.read_config().orchestrator.eval
    return evaluation.target, evaluation.consecutive


def seconds_to_target(evaluations: Sequence[Record], target: float | None, consecutive: int) -> float | None:
    """Seconds at the evaluation that reached `target`, sampled and greedy, as the `consecutive`th in a row.

    >>> lines = [{EVAL_SAMPLED: r, EVAL_GREEDY: 1.0, ELAPSED: 10.0 * i} for i, r in enumerate([0.0, 0.9, 0.9, 1.0])]
    >>> seconds_to_target(lines, 0.9, 2), seconds_to_target(lines, 0.95, 1), seconds_to_target(lines, 0.95, 2)
    (20.0, 30.0, None)
    """
    in_a_row = 0
    for line in evaluations:
        reached = target is not None and min(line[EVAL_SAMPLED], line.get(EVAL_GREEDY) or 0.0) >= target
        in_a_row = in_a_row + 1 if reached else 0
        if in_a_row == consecutive:
            seconds: float = line[ELAPSED]
            return seconds
    return None


def _over(what: Any, steps: Iterable[Record], key: str) -> float | None:
    values = [line[key] for line in steps if line.get(key) is not None]
    return what(values) if values else None


# ── as text ─────────────────────────────────────────────────────────────────────────────────────────────────


def shown(row: Row) -> list[str]:
    """A row's cells, rounded."""
    cells = []
    for column, (_, form) in COLUMNS.items():
        value = row.figures[column]
        cells.append("-" if value is None else form.format(value) if form else str(value))
    return cells


def as_text(rows: Sequence[Row]) -> str:
    """The table in fixed columns."""
    lines = [list(COLUMNS), *map(shown, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "".join(
        "  ".join(
            cell.ljust(width) if place < 2 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        + "\n"
        for line in lines
    )


def as_csv(rows: Sequence[Row]) -> str:
    """The table with its figures in full; nothing where there is none."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([["" if row.figures[c] is None else row.figures[c] for c in COLUMNS] for row in rows])
    return text.getvalue()


def compare_and_show(folders: Sequence[str | Path], into: Path) -> None:
    """`compare`, the table on the screen and where the rest is. Raises VlmrlError."""
    print(as_text(compare(folders, into)), end="")
    print(f"also as {into}/compare.html, .png, .csv, .txt")
