"""Curves of held-out rewards as an SVG, one panel per table row, without a library for plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

LETTER = 7.0
"""Pixels between two letters of a label, where there is room."""
WIDTH, HEIGHT = 250, 150
"""Of a panel's axes, in pixels."""
MARGIN = 34
COLORS = ("#4269d0", "#efb118", "#3ca951", "#ff725c", "#6cc5b0", "#9c6b4e")


@dataclass(frozen=True)
class Curve:
    """Held-out rewards of one run."""

    label: str
    points: Sequence[tuple[int, float]]
    """(optimizer step, or whatever `draw` is told, and reward from 0 to 1)."""
    is_control: bool


def draw(panels: Mapping[str, Sequence[Curve]], unit: str | None = None) -> str:
    """An SVG of the panels side by side. By default points are at optimizer steps, and all panels have the same axes;
    with another unit, each panel has its own."""
    steps = [step for curves in panels.values() for curve in curves for step, _ in curve.points]
    width, height = len(panels) * (WIDTH + MARGIN) + MARGIN, HEIGHT + 3 * MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for number, (title, curves) in enumerate(panels.items()):
        own = steps if unit is None else [step for curve in curves for step, _ in curve.points]
        parts += _panel(MARGIN + number * (WIDTH + MARGIN), title, curves, max([1, *own]), unit)
    return "\n".join([*parts, "</svg>\n"])


def _panel(left: int, title: str, curves: Sequence[Curve], most: int, unit: str | None) -> list[str]:
    top, bottom = MARGIN, MARGIN + HEIGHT
    parts = [f'<text x="{left}" y="{top - 12}" font-weight="bold">{escape(title)}</text>']
    for reward in (0.0, 0.5, 1.0):
        y = bottom - reward * HEIGHT
        parts.append(f'<path d="M{left} {y:.1f}h{WIDTH}" stroke="#dddddd"/>')
        parts.append(f'<text x="{left - 5}" y="{y + 4:.1f}" text-anchor="end">{reward:g}</text>')
    for step in (0, most):
        anchor = "start" if step == 0 else "end"
        x = left + step / most * WIDTH
        label = f"step {step}" if unit is None else f"{step:,} {unit}"
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="{anchor}">{label}</text>')
    for number, curve in enumerate(curves):
        color = "#888888" if curve.is_control else COLORS[number % len(COLORS)]
        dashes = ' stroke-dasharray="4 3"' if curve.is_control else ""
        line = " ".join(f"{left + s / most * WIDTH:.1f},{bottom - r * HEIGHT:.1f}" for s, r in curve.points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="1.8"{dashes}/>')
        before = sum(len(each.label) + 2 for each in curves[:number])
        x = left + before * min(LETTER, WIDTH / sum(len(each.label) + 2 for each in curves))
        parts.append(f'<text x="{x:.1f}" y="{bottom + 34}" fill="{color}">{escape(curve.label)}</text>')
    return parts
