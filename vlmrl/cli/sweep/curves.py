"""The curves of a comparison: training reward, main evaluation and named evaluation sets over seconds, a line per run.

    metrics.jsonl of each run ─▶ curves_of ─▶ panels ─┬─▶ compare.html (compare.js, uPlot)
                                                      └─▶ compare.png  (matplotlib)

A panel shows one metric, and a run has a line in it where it has that metric at all.
"""

from __future__ import annotations

import importlib.util
import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlmrl.monitor.report.named_sets import named_sets
from vlmrl.record.metrics import ELAPSED, EVAL_GREEDY, EVAL_SAMPLED, Record

TRAINING = "training reward"
SAMPLED = "held-out reward (sampled)"
GREEDY = "held-out reward (greedy)"

VIRIDIS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
"""RGB of matplotlib's colormap of that name at 0, 1/4, 1/2, 3/4 and 1."""

MOST_POINTS = 60
"""Points of a line up to which each is marked."""


@dataclass(frozen=True)
class Curve:
    """One metric of one run."""

    seconds: tuple[float, ...]
    """Wall-clock time of each value since the start of the run."""
    values: tuple[float, ...]
    errors: tuple[float, ...] | None = None
    """Standard errors; None where the run did not record them."""


@dataclass(frozen=True)
class Panel:
    """One metric of all runs that have it."""

    title: str
    lines: Sequence[tuple[str, tuple[int, int, int], Curve]]
    """Name and RGB of the run, and its curve."""


def curves_of(metrics: Sequence[Record]) -> dict[str, Curve]:
    """The curves of a run by the title of their panel. The curve of a set is its sampled reward, or its greedy one
    where it has no sampled answers.

    >>> line = {"eval/reward": 0.5, "eval/ood/reward": 0.25, "eval/ood/reward_se": 0.1, "time/elapsed": 9.0}
    >>> curves_of([{"time/elapsed": 1.0}, line])["set ood"]
    Curve(seconds=(9.0,), values=(0.25,), errors=(0.1,))
    """
    keys = {SAMPLED: EVAL_SAMPLED, GREEDY: EVAL_GREEDY}
    for each in named_sets(dict.fromkeys(key for line in metrics for key in line)):
        scores = each["scores"]
        if "reward" in scores:
            keys[f"set {each['name']}"] = scores["reward"]
        elif "reward_greedy" in scores:
            keys[f"set {each['name']} (greedy)"] = scores["reward_greedy"]
    found = {title: _curve(metrics, key) for title, key in (keys | {TRAINING: "reward/mean"}).items()}
    return {title: curve for title, curve in found.items() if curve.seconds}


def _curve(metrics: Sequence[Record], key: str) -> Curve:
    lines = [line for line in metrics if line.get(key) is not None and line.get(ELAPSED) is not None]
    errors = tuple(line.get(f"{key}_se") for line in lines)
    whole = tuple(error or 0.0 for error in errors) if any(error is not None for error in errors) else None
    return Curve(tuple(line[ELAPSED] for line in lines), tuple(line[key] for line in lines), whole)


def panels(named: Sequence[tuple[str, Mapping[str, Curve]]]) -> list[Panel]:
    """The panels of runs with their names: the main evaluation, the sets in the order in which they appear, then
    training. A run has the same color in all of them."""
    titles = dict.fromkeys([SAMPLED, GREEDY, *(title for _, curves in named for title in curves)])
    titles = dict.fromkeys([*(title for title in titles if title != TRAINING), TRAINING])
    made = []
    for title in titles:
        lines = [
            (name, color, curves[title])
            for (name, curves), color in zip(named, colors(len(named)), strict=True)
            if title in curves
        ]
        if lines:
            made.append(Panel(title, lines))
    return made


def as_content(made: Sequence[Panel]) -> list[dict[str, Any]]:
    """The panels as compare.js reads them."""
    return [
        {
            "title": panel.title,
            "runs": [
                {
                    "name": name,
                    "color": f"rgb{color}",
                    "seconds": curve.seconds,
                    "values": curve.values,
                    "errors": curve.errors,
                }
                for name, color, curve in panel.lines
            ],
        }
        for panel in made
    ]


def colors(count: int) -> list[tuple[int, int, int]]:
    """RGB, 0 to 255, of `count` lines, evenly spaced on viridis.

    >>> colors(3), colors(2)[0] == colors(1)[0]
    ([(68, 1, 84), (33, 145, 140), (253, 231, 37)], True)
    """
    found = []
    for place in range(count):
        position = place / max(count - 1, 1) * (len(VIRIDIS) - 1)
        left = min(int(position), len(VIRIDIS) - 2)
        pairs = zip(VIRIDIS[left], VIRIDIS[left + 1], strict=True)
        red, green, blue = (round(a + (b - a) * (position - left)) for a, b in pairs)
        found.append((red, green, blue))
    return found


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def as_picture(made: Sequence[Panel]) -> bytes:
    """compare.png: the panels in two columns, with one legend for all of them."""
    from matplotlib.figure import Figure

    across = min(2, max(1, len(made)))
    down = max(1, -(-len(made) // across))
    figure = Figure(figsize=(5 + 4 * across, 1 + 3.4 * down), dpi=120, layout="constrained")
    grid = figure.subplots(down, across, squeeze=False).ravel()
    for axes in grid[max(1, len(made)) :]:
        axes.remove()
    handles: dict[tuple[str, tuple[int, int, int]], Any] = {}
    for axes, panel in zip(grid, made, strict=False):
        for name, color, curve in panel.lines:
            rgb = tuple(part / 255 for part in color)
            marker = "o" if len(curve.values) <= MOST_POINTS else None
            (handles[name, color],) = axes.plot(curve.seconds, curve.values, marker=marker, markersize=3, color=rgb)
            if curve.errors is not None:
                low, high = zip(*((v - e, v + e) for v, e in zip(curve.values, curve.errors, strict=True)), strict=True)
                axes.fill_between(curve.seconds, low, high, color=rgb, alpha=0.15, linewidth=0)
        axes.set_title(_plain(panel.title), fontsize="medium", loc="left")
    for axes in grid[: max(1, len(made))]:
        axes.set_xlabel("seconds")
        axes.set_ylim(min(-0.02, axes.get_ylim()[0]), max(1.02, axes.get_ylim()[1]))
        axes.grid(alpha=0.3)
    if handles:
        labels = [_plain(name) for name, _ in handles]
        figure.legend(list(handles.values()), labels, loc="outside right upper", fontsize="small", frameon=False)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # names of any script: boxes in the picture, no noise
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _plain(text: str) -> str:
    """Text in which matplotlib finds no formula, and no label that it hides."""
    return text.replace("$", r"\$") if not text.startswith("_") else " " + text.replace("$", r"\$")
