"""Draw a few rollouts in the terminal: their images as small coloured squares, and the policy's answers.

    ▀▀▀▀▀▀ ▀▀▀▀▀▀   reward 0.25  FEEC  terminated
    ▀▀▀▀▀▀ ▀▀▀▀▀▀   › FE
    ▀▀▀▀▀▀ ▀▀▀▀▀▀   › FEDC

A terminal cell shows two pixels, one above the other: an upper half block in one colour on a background in another.
A video is shown by its first, middle and last frame. With fewer than 256 colours, the sizes are shown as text instead.
Left out on purpose: sixel and other image protocols, because the view is redrawn in place and cannot draw over such
images. report.html shows the pixels.
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

from vlmrl.rendering.filmstrip import described, shown_frames
from vlmrl.types import Group, ImageItem, MMItem, Rollout

SHOWN = 3
"""Rollouts that are shown of a step."""
ROWS = 3
"""Lines per rollout, which is the height of its images, two pixels to a line."""
MAX_COLUMNS = 12
"""Largest width of an image, one pixel to a column."""
MAX_IMAGES = 4
"""Images and videos per rollout; the last ones are shown."""
VIDEO_FRAMES = 3
"""Frames of a video."""
MAX_THUMBNAILS = 256
"""Thumbnails that are cached; then the cache is cleared."""


def pick(groups: Sequence[Group]) -> list[Rollout]:
    """The first rollout of each of `SHOWN` groups at even distances. If there is one group, its first rollouts."""
    rollouts = [rollout for group in groups for rollout in group.rollouts[: SHOWN if len(groups) == 1 else 1]]
    places = np.linspace(0, len(rollouts), min(SHOWN, len(rollouts)), endpoint=False)
    return [rollouts[int(place)] for place in places]


class Glimpse:
    """Draws rollouts and caches the thumbnails of their images."""

    def __init__(self, *, squares: bool) -> None:
        """`squares`: draw images as squares; the terminal needs at least 256 colours."""
        self._squares = squares
        self._thumbnails: dict[str, Text] = {}

    def draw(self, rollouts: Sequence[Rollout]) -> RenderableType:
        """Draw `ROWS` lines per rollout, with an empty line between two."""
        grid = Table.grid(padding=(0, 2, 0, 0), expand=True)
        grid.add_column(no_wrap=True)
        grid.add_column(ratio=1)
        for number, rollout in enumerate(rollouts):
            if number:
                grid.add_row()
            grid.add_row(self._images(rollout), said(rollout))
        return grid

    def _images(self, rollout: Rollout) -> RenderableType:
        items = rollout.turns[-1].prompt.mm_items if rollout.turns else ()
        if not self._squares:
            return Text("\n".join(size_of(item) for item in items[-ROWS:]), style="dim")
        row = Table.grid(padding=(0, 1, 0, 0))
        hidden = len(items) - MAX_IMAGES
        parts: list[RenderableType] = [Text(f"+{hidden}", style="dim")] if hidden > 0 else []
        row.add_row(*parts, *(each for item in items[-MAX_IMAGES:] for each in self._thumbnails_of(item)))
        return row

    def _thumbnails_of(self, item: MMItem) -> list[Text]:
        """One for an image, some for a video."""
        if isinstance(item, ImageItem):
            return [self._thumbnail(item.hash, item.pixels)]
        places = shown_frames(len(item.frames), VIDEO_FRAMES)
        return [self._thumbnail(item.frame_hashes[place], item.frames[place]) for place in places]

    def _thumbnail(self, hash: str, pixels: np.ndarray) -> Text:
        if hash not in self._thumbnails:
            if len(self._thumbnails) >= MAX_THUMBNAILS:
                self._thumbnails.clear()
            self._thumbnails[hash] = thumbnail(pixels)
        return self._thumbnails[hash]


def thumbnail(shown: np.ndarray) -> Text:
    """An image (uint8 [H, W, 3]) as `ROWS` lines of half blocks. Keeps its proportions unless `MAX_COLUMNS` limits its
    width."""
    height, width = shown.shape[:2]
    columns = max(1, min(MAX_COLUMNS, round(2 * ROWS * width / height)))
    small = PIL.Image.fromarray(shown).resize((columns, 2 * ROWS), PIL.Image.Resampling.BOX)
    pixels = np.asarray(small)
    text = Text()
    for row in range(ROWS):
        cells = (tuple(map(int, (*upper, *lower))) for upper, lower in zip(*pixels[2 * row : 2 * row + 2], strict=True))
        for cell, run in groupby(cells):  # join equal neighbours, so that the terminal has less to parse
            text.append("▀" * len(list(run)), Style(color=Color.from_rgb(*cell[:3]), bgcolor=Color.from_rgb(*cell[3:])))
        text.append("\n" if row + 1 < ROWS else "")
    return text


def size_of(item: MMItem) -> str:
    """The size of an image or a video as text, e.g. `[image 32 × 48]`."""
    if not isinstance(item, ImageItem):
        return f"[video {described(item)}]"
    height, width = item.pixels.shape[:2]
    return f"[image {width} × {height}]"


def said(rollout: Rollout) -> Text:
    """A line with reward, problem and stop reason, then the last answers of the policy, one line each."""
    ended = f"dropped: {rollout.dropped}" if rollout.dropped else str(rollout.stop_reason)
    text = Text(no_wrap=True, overflow="ellipsis")
    text.append(f"reward {rollout.reward:.2f}", "bold")
    text.append(f"  {printable(rollout.problem_id)}  {ended}")
    for turn in rollout.turns[1 - ROWS :]:
        text.append("\n› ", "dim")
        text.append(printable(turn.text))
    return text


def printable(text: str) -> str:
    """Replace control characters in a policy's text, so that they cannot move the cursor.

    >>> printable("two\\nlines, \\x1b[2J and a bell\\x07")
    'two⏎lines, ·[2J and a bell·'
    """
    return "".join("⏎" if character == "\n" else character if character.isprintable() else "·" for character in text)
