"""Functions as a user writes them for `tool=[support.own_tools:fn]`."""

from __future__ import annotations

import asyncio
import threading
from typing import Annotated, Literal

import numpy as np
from PIL import Image as PILImage

from vlmrl import Image

RELEASED = threading.Event()
"""Lets the calls of `hang` return."""


def count(image: Image, what: str, most: int = 9) -> int:
    """Count things in an image.

    Looks at every pixel.

    Args:
        what: What is counted,
            in one word.
        most: The largest number.

    Returns:
        The number.
    """
    return min(most, len(what) * int(image.source.shape[0]))


def flip(image: PILImage.Image, axis: Literal["x", "y"] = "x") -> PILImage.Image:
    """Mirror an image."""
    way = PILImage.Transpose.FLIP_LEFT_RIGHT if axis == "x" else PILImage.Transpose.FLIP_TOP_BOTTOM
    return image.transpose(way)


def darker(image: np.ndarray) -> list[object]:
    """Halve the brightness."""
    image //= 2  # draws on the image that it got
    return ["half as bright", image]


async def wait(seconds: float) -> str:
    """Wait for a while."""
    await asyncio.sleep(seconds)
    return f"waited {seconds:g} s"


def hang() -> None:
    """Never return by itself."""
    RELEASED.wait()


def fail(how: Annotated[str, "What it does."]) -> object:
    """Go wrong."""
    if how == "exit":
        raise SystemExit(3)
    if how == "nothing":
        return None
    if how == "odd":
        return {1, 2}
    if how == "image":
        return Image(b"no image")
    raise ValueError(f"it is {how}")


def without_words(x: int) -> int:
    return x


def without_hint(x) -> int:  # type: ignore[no-untyped-def]
    """Do something."""
    return int(x)


def of_a_set(x: set[int]) -> int:
    """Do something."""
    return len(x)
