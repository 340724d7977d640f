"""A few rollouts on the terminal: what the policy saw, as small coloured squares, and what it said.

    ▀▀▀▀▀▀ ▀▀▀▀▀▀   reward 0.25  FEEC  terminated
    ▀▀▀▀▀▀ ▀▀▀▀▀▀   › FE
    ▀▀▀▀▀▀ ▀▀▀▀▀▀   › FEDC

A cell of the terminal shows two pixels, one above the other: the upper half block in one colour on the other. Where
there are fewer than 256 colours, the sizes of the images stand there in words. Left out on purpose: sixel and other
picture protocols, for the view is redrawn in place and cannot draw over them; report.html has the pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
import PIL.Image
from rich.color import Color
from rich.console import RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text

from vlmrl.types import Group, ImageItem, Rollout

SHOWN = 3
"""Rollouts of a step."""
ROWS = 3
"""Lines of a rollout: its images' height, two pixels to a line."""
MAX_COLUMNS = 12
"""Of an image, one pixel to a column."""
MAX_IMAGES = 4
"""Of a rollout: its last ones."""
REMEMBERED = 256
"""Thumbnails that need not be made again."""


def pick(groups: Sequence[Group]) -> list[Rollout]:
    """The first rollouts of `SHOWN` groups at even distances; of one group, its first ones."""
    rollouts = [rollout for group in groups for rollout in group.rollouts[: SHOWN if len(groups) == 1 else 1]]
    places = np.linspace(0, len(rollouts), min(SHOWN, len(rollouts)), endpoint=False)
    return [rollouts[int(place)] for place in places]


class Glimpse:
    """Draws rollouts; remembers the thumbnails of images that were drawn lately, not the images."""

    def __init__(self, *, squares: bool) -> None:
        """`squares`: the terminal has 256 colours or more."""
        self._squares = squares
        self._thumbnails: dict[str, Text] = {}

    def draw(self, rollouts: Sequence[Rollout]) -> RenderableType:
        """`ROWS` lines per rollout, an empty one between two."""
        grid = Table.grid(padding=(0, 2, 0, 0), expand=True)
        grid.add_column(no_wrap=True)
        grid.add_column(ratio=1)
        for number, rollout in enumerate(rollouts):
            if number:
                grid.add_row()
            grid.add_row(self._images(rollout), said(rollout))
        return grid

    def _images(self, rollout: Rollout) -> RenderableType:
        images = rollout.turns[-1].prompt.images if rollout.turns else ()
        if not self._squares:
            return Text("\n".join(size_of(image) for image in images[-ROWS:]), style="dim")
        row = Table.grid(padding=(0, 1, 0, 0))
        hidden = len(images) - MAX_IMAGES
        parts: list[RenderableType] = [Text(f"+{hidden}", style="dim")] if hidden > 0 else []
        row.add_row(*parts, *(self._thumbnail(image) for image in images[-MAX_IMAGES:]))
        return row

    def _thumbnail(self, image: ImageItem) -> Text:
        if image.hash not in self._thumbnails:
            if len(self._thumbnails) >= REMEMBERED:
                self._thumbnails.clear()
            self._thumbnails[image.hash] = thumbnail(image)
        return self._thumbnails[image.hash]


def thumbnail(image: ImageItem) -> Text:
    """The image in `ROWS` lines of half blocks, its proportions kept as far as `MAX_COLUMNS` allows."""
    height, width = image.pixels.shape[:2]
    columns = max(1, min(MAX_COLUMNS, round(2 * ROWS * width / height)))
    small = PIL.Image.fromarray(image.pixels).resize((columns, 2 * ROWS), PIL.Image.Resampling.BOX)
    pixels = np.asarray(small)
    text = Text()
    for row in range(ROWS):
        cells = (tuple(map(int, (*upper, *lower))) for upper, lower in zip(*pixels[2 * row : 2 * row + 2], strict=True))
        for cell, run in groupby(cells):  # equal neighbours in one piece: less for the terminal to read
            text.append("▀" * len(list(run)), Style(color=Color.from_rgb(*cell[:3]), bgcolor=Color.from_rgb(*cell[3:])))
        text.append("\n" if row + 1 < ROWS else "")
    return text


def size_of(image: ImageItem) -> str:
    height, width = image.pixels.shape[:2]
    return f"[image {width} × {height}]"


def said(rollout: Rollout) -> Text:
    """Reward, problem, how it ended, then the policy's last answers, a line each."""
    ended = f"dropped: {rollout.dropped}" if rollout.dropped else str(rollout.stop_reason)
    text = Text(no_wrap=True, overflow="ellipsis")
    text.append(f"reward {rollout.reward:.2f}", "bold")
    text.append(f"  {printable(rollout.problem_id)}  {ended}")
    for turn in rollout.turns[1 - ROWS :]:
        text.append("\n› ", "dim")
        text.append(printable(turn.text))
    return text


def printable(text: str) -> str:
    """What a policy may say must not move the cursor.

    >>> printable("two\\nlines, \\x1b[2J and a bell\\x07")
    'two⏎lines, ·[2J and a bell·'
    """
    return "".join("⏎" if character == "\n" else character if character.isprintable() else "·" for character in text)
