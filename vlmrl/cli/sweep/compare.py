"""`mode=compare`, and the end of every sweep: one table and the curves of all runs.

    folders ─▶ runs_in ─▶ config.yaml, metrics.jsonl, summary.json ─▶ one Row per run ─▶ compare.txt, .csv, .html, .png

Runs that are still going, or that have not started, have a row as well, so the table can be made at any time.
compare.html is one self-contained page that uPlot draws; compare.png needs matplotlib (`pip install 'vlmrl[plot]'`) and
is left out where it is not installed.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import fmean, median
from typing import Any

import orjson
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vlmrl.cli.sweep.curves import Curve, Panel, as_content, as_picture, can_plot, curves_of, panels
from vlmrl.cli.sweep.jobs import runs_in, state_of
from vlmrl.record.disk_bound import read_deleted
from vlmrl.record.files import disk_errors, read_errors, write_bytes_atomically
from vlmrl.record.metrics import ELAPSED, EVAL_GREEDY, EVAL_SAMPLED, Record, read_metrics
from vlmrl.record.run_dir import RunDir

THROUGHPUT, MISMATCH_MEAN, MISMATCH_MAX = "throughput/tokens_per_s", "mismatch_kl/mean", "mismatch_kl/max"

COLUMNS: dict[str, tuple[str, str]] = {
    "job": ("name of the run: the overrides in which it differs from the others, or its folder", ""),
    "state": ("new, running, stopped, killed, failed, finished", ""),
    "step": ("optimizer steps so far", "{:d}"),
    EVAL_SAMPLED: ("held-out reward at the last evaluation, sampled", "{:.3f}"),
    EVAL_GREEDY: ("held-out reward at the last evaluation, greedy", "{:.3f}"),
    "reward/mean": ("mean reward of the last step's rollouts", "{:.3f}"),
    "seconds_to_target": ("seconds until orchestrator.eval.target was reached; empty if it was not", "{:.0f}"),
    "seconds": ("wall-clock seconds so far", "{:.0f}"),
    THROUGHPUT: ("median over the steps", "{:.0f}"),
    MISMATCH_MEAN: ("mean over the steps", "{:.1e}"),
    MISMATCH_MAX: ("maximum over the steps", "{:.1e}"),
}
"""Column → its meaning, and its format in the text and the page. The CSV has the numbers in full."""

FILES = Path(__file__).parent


@dataclass(frozen=True)
class Row:
    """One run in the table."""

    run_dir: RunDir
    values: Mapping[str, Any]
    """By column; None where the run has no such value (yet)."""
    curves: Mapping[str, Curve]
    """By the title of their panel."""


def compare_and_show(folders: Sequence[str | Path], into: Path) -> None:
    """Write the comparison, print its table and say where the files are. Raises VlmrlError."""
    compare(folders, into)
    print((into / "compare.txt").read_text(encoding="utf-8"), end="")
    if can_plot():
        print(f"also as {into}/compare.html, .png, .csv, .json, .txt")
    else:
        print(
            f"also as {into}/compare.html, .csv, .json, .txt; compare.png needs matplotlib: pip install 'vlmrl[plot]'"
        )


@read_errors()
def compare(folders: Sequence[str | Path], into: Path) -> list[Row]:
    """Write compare.txt, compare.csv, compare.json, compare.html and, with matplotlib, compare.png into an existing
    folder. The text, the page and the JSON also have the runs' evaluations (`vlmrl.runs.compare`).

    Raises ConfigError where a folder holds no run, VlmrlError where files cannot be read or written.
    """
    from vlmrl.runs import compare as evaluations

    rows = read_rows([run for folder in folders for run in runs_in(Path(folder))])
    called = [str(row.values["job"]) for row in rows]
    scored = evaluations.compared(evaluations.read_evaluations([row.run_dir for row in rows], called))
    text = as_text(rows) + (f"\n{evaluations.as_text(scored)}" if scored else "")
    files = {
        "txt": text.encode(),
        "csv": as_csv(rows).encode(),
        "json": orjson.dumps(evaluations.as_json(scored), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE),
        "html": as_page(rows, into, evaluations.as_html(scored)),
    }
    if can_plot():
        files["png"] = as_picture(panels_of(rows))
    else:
        with disk_errors(into / "compare.png"):
            (into / "compare.png").unlink(missing_ok=True)  # of an earlier comparison, with other numbers
    for ending, content in files.items():
        path = into / f"compare.{ending}"
        with disk_errors(path):
            write_bytes_atomically(path, content)
    return rows


# ── the rows ────────────────────────────────────────────────────────────────────────────────────────────────


def read_rows(runs: Sequence[RunDir]) -> list[Row]:
    """One row per run, in the order of `runs`. Raises VlmrlError where a run's files are damaged."""
    return [_row(run, name) for run, name in zip(runs, names(runs), strict=True)]


def names(runs: Sequence[RunDir]) -> list[str]:
    """The name of each run: the overrides that not all jobs have in common, or the folder of a run that is no job."""
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
    values = {
        "job": name,
        "state": state_of(run).value,
        "step": last.get("step"),
        EVAL_SAMPLED: evaluations[-1][EVAL_SAMPLED] if evaluations else None,
        EVAL_GREEDY: evaluations[-1].get(EVAL_GREEDY) if evaluations else None,
        "reward/mean": steps[-1].get("reward/mean") if steps else None,
        "seconds_to_target": seconds_to_target(evaluations, *_target(run)),
        "seconds": summary.get("wall_clock_s", last.get(ELAPSED)),
        THROUGHPUT: _over_steps(median, steps, THROUGHPUT),
        MISMATCH_MEAN: _over_steps(fmean, steps, MISMATCH_MEAN),
        MISMATCH_MAX: _over_steps(max, steps, MISMATCH_MAX),
    }
    return Row(run, values, curves_of(metrics))


def _target(run: RunDir) -> tuple[float | None, int]:
    """`orchestrator.eval.target` and `.consecutive` of the run; a run that has not started has no target."""
    if not run.config.exists():
        return None, 1
    config = run.read_config(key="runs")
    target, consecutive = (_number_of(config, f"orchestrator.eval.{key}") for key in ("target", "consecutive"))
    return target, int(consecutive or 1)


def _number_of(config: DictConfig, key: str) -> float | None:
    """The value of a dotted key of a recorded config; None where that is no number."""
    try:
        value = OmegaConf.select(config, key)
    except OmegaConfBaseException:
        return None
    return value if isinstance(value, int | float) else None


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


def _over_steps(reduce: Callable[[list[float]], float], steps: Iterable[Record], key: str) -> float | None:
    values = [line[key] for line in steps if line.get(key) is not None]
    return reduce(values) if values else None


# ── text and CSV ────────────────────────────────────────────────────────────────────────────────────────────


def cells(row: Row) -> list[str]:
    """A row's values as text, rounded; `-` for None."""
    texts = []
    for column, (_, form) in COLUMNS.items():
        value = row.values[column]
        texts.append("-" if value is None else form.format(value) if form else str(value))
    return texts


def notes(rows: Sequence[Row]) -> list[str]:
    """A sentence about each run that has deleted rollouts itself, so that fewer of them can be looked at."""
    deleted = ((row.values["job"], read_deleted(row.run_dir)) for row in rows)
    return [f"{name} {each.says()}" for name, each in deleted if each is not None]


def as_text(rows: Sequence[Row]) -> str:
    """The table in columns of fixed width, and notes."""
    lines = [list(COLUMNS), *map(cells, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "".join(
        "  ".join(
            cell.ljust(width) if place < 2 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        + "\n"
        for line in lines
    ) + "".join(f"{note}\n" for note in notes(rows))


def as_csv(rows: Sequence[Row]) -> str:
    """The table with its numbers in full; None is an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([["" if row.values[c] is None else row.values[c] for c in COLUMNS] for row in rows])
    return text.getvalue()


# ── the page ────────────────────────────────────────────────────────────────────────────────


def panels_of(rows: Sequence[Row]) -> list[Panel]:
    """The curves of all runs."""
    return panels([(str(row.values["job"]), row.curves) for row in rows])


def as_page(rows: Sequence[Row], folder: Path, evaluations: str = "") -> bytes:
    """compare.html, to be written into `folder`: the table, the HTML of `evaluations`, and curves that uPlot draws.
    No request leaves it."""
    from vlmrl.monitor.report.page import FILES as REPORT_FILES
    from vlmrl.monitor.report.page import assembled

    return assembled(
        (FILES / "compare.html").read_bytes(),
        title=f"{len(rows)} runs compared",
        scripts=[_text(REPORT_FILES / "vendor/uPlot.iife.min.js"), _text(FILES / "compare.js")],
        styles=[_text(REPORT_FILES / "vendor/uPlot.min.css"), _text(FILES / "compare.css")],
        content=as_content(panels_of(rows)),
        body=html_table(rows, folder) + evaluations,
    )


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def html_table(rows: Sequence[Row], folder: Path) -> str:
    """The table, and notes. The name of a run that has a report.html is a link to it, relative to `folder`."""
    head = "".join(f'<th title="{escape(meaning)}">{escape(column)}</th>' for column, (meaning, _) in COLUMNS.items())
    body = ""
    for row in rows:
        name, *others = map(escape, cells(row))
        report = row.run_dir.report
        if report.exists():
            name = f'<a href="{escape(os.path.relpath(report, folder))}">{name}</a>'
        body += f"<tr><td>{name}</td>{''.join(f'<td>{text}</td>' for text in others)}</tr>\n"
    below = "".join(f"\n<p>{escape(note)}</p>" for note in notes(rows))
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>{below}"
