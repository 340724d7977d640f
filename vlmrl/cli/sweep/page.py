"""The plot across runs (PNG), and one self-contained HTML page of table and plot."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from vlmrl.cli.sweep.compare import COLUMNS, Row, shown

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #ddd; }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; }
th { font-weight: 600; cursor: help; }
img { max-width: 100%; margin-top: 1.5rem; }
.scroll { overflow-x: auto; }
"""


def plot(rows: Sequence[Row]) -> bytes:
    """PNG: held-out reward over seconds, a line per run that was evaluated."""
    figure = Figure(figsize=(10, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    colors = mpl.colormaps["viridis"].resampled(max(len(rows), 2))
    for place, row in enumerate(rows):
        if row.curve[0]:
            axes.plot(*row.curve, marker="o", markersize=3, color=colors(place), label=str(row.figures["job"]))
    axes.set_xlabel("seconds")
    axes.set_ylabel("held-out reward (sampled)")
    axes.set_ylim(-0.02, max(1.02, axes.get_ylim()[1]))
    axes.grid(alpha=0.3)
    if axes.lines:
        figure.legend(loc="outside right upper", fontsize="small", frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def page(rows: Sequence[Row], picture: bytes, folder: Path) -> str:
    """HTML; `picture` is the plot. The name of a run whose folder has a report.html leads there from `folder`."""
    head = "".join(f'<th title="{escape(meaning)}">{escape(column)}</th>' for column, (meaning, _) in COLUMNS.items())
    body = ""
    for row in rows:
        name, *figures = map(escape, shown(row))
        report = row.run_dir.path / "report.html"
        if report.exists():
            name = f'<a href="{escape(os.path.relpath(report, folder))}">{name}</a>'
        body += f"<tr><td>{name}</td>{''.join(f'<td>{figure}</td>' for figure in figures)}</tr>\n"
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{len(rows)} runs compared</title>\n'
        f"<style>{STYLE}</style>\n<h1>{len(rows)} runs</h1>\n"
        f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table></div>\n'
        f'<img alt="Held-out reward over seconds" src="data:image/png;base64,{base64.b64encode(picture).decode()}">\n'
        "</html>\n"
    )
