"""Video files, made with PyAV."""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

LOSSLESS = ("matroska", "ffv1", "bgr0")
"""Container, codec and pixel format that keep RGB to the bit."""


def moving(count: int, height: int = 48, width: int = 64, seed: int = 0) -> NDArray[np.uint8]:
    """uint8 [T, H, W, 3]; frames that differ in every pixel."""
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), np.uint8)


def encoded(
    frames: NDArray[np.uint8],
    rate: Fraction | int = 10,
    kind: tuple[str, str, str] = LOSSLESS,
    *,
    stamps: Sequence[int] | None = None,
    rotation: int = 0,
    options: dict[str, str] | None = None,
) -> bytes:
    """A file of `frames`; frame k is shown at `stamps[k]` / 1000 seconds, or at k / `rate`."""
    av = pytest.importorskip("av")
    container, codec, pixels = kind
    buffer = io.BytesIO()
    # Without this flag a container gets a random name, so the same frames would be another file each time.
    with av.open(buffer, "w", format=container, options={"fflags": "bitexact"}) as output:
        stream: Any = output.add_stream(codec, rate=rate if stamps is None else 1000, options=options or {})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixels
        if rotation:
            stream.set_display_rotation(rotation)
        for number, pixels_of_frame in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels_of_frame, format="rgb24")
            frame.pts = number if stamps is None else stamps[number]
            frame.time_base = 1 / Fraction(rate) if stamps is None else Fraction(1, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return buffer.getvalue()
