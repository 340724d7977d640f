"""Frames of a `Video` part, whatever it is handed in as, and whatever is wrong with it.

    path, bytes ──────────────────▶ when each frame is shown ─┐
    uint8 [T, H, W, 3], T frames ─▶ i / fps ──────────────────┼─choose─▶ Clip        every fault: VideoError
                          no fps ─▶ all are shown ────────────┘

The family's own rule chooses the frames (`ChooseFrames`), from how many there are and how many are shown a second.
Frames become pixels as images do (images.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from vlmrl.rendering.images import MAX_PIXELS, ImageError, decode
from vlmrl.types import IntArray, Video


class VideoError(ImageError):
    """A video that cannot be decoded or processed. Ends its rollout as `image_error`; not an error of the run."""


@dataclass(frozen=True, eq=False)
class Clip:
    """The frames of a video that the policy is shown."""

    frames: NDArray[np.uint8]
    """uint8 [T, H, W, 3]; RGB, 0 to 255."""
    times: NDArray[np.float64]
    """float64 [T]; when each frame is shown, in seconds from the beginning of the video, ascending."""
    rate: float
    """Frames of this clip per second, on average over the video."""


class ChooseFrames(Protocol):
    """The family's rule: which of `total` frames, of which `rate` are shown a second, the policy sees → int64 [T],
    ascending. Raises `VideoError` where they are more than a prompt may hold."""

    def __call__(self, total: int, rate: float) -> IntArray: ...


def decode_video(video: Video, choose: ChooseFrames, sampled_rate: float) -> Clip:
    """The chosen frames of a video. `sampled_rate` is how many frames a second a video has that comes sampled already.
    Raises `VideoError`."""
    source: Any = video.source
    if isinstance(source, bytes | str | Path):
        raise VideoError("video files are not read yet")
    frames = _stacked(source)
    if video.times is not None:
        return _checked(frames, np.array(video.times, np.float64), video.fps)
    if video.fps is None:
        return _checked(frames, np.arange(len(frames)) / sampled_rate, sampled_rate)
    chosen = choose(len(frames), video.fps)
    return _checked(frames[chosen], chosen / video.fps, len(chosen) / len(frames) * video.fps)


def _stacked(source: Any) -> NDArray[np.uint8]:
    """uint8 [T, H, W, 3] of an array or of a sequence of frames."""
    if not isinstance(source, np.ndarray | Sequence):
        raise VideoError(
            "a video must be a path, bytes, a uint8 array [T, H, W, 3] or a sequence of frames, not "
            f"{type(source).__name__}"
        )
    if len(source) == 0:
        raise VideoError("a video has no frame")
    decoded = [decode(frame) for frame in source]
    sizes = {frame.shape[:2] for frame in decoded}
    if len(sizes) > 1:
        (height, width), (other_height, other_width) = sorted(sizes)[:2]
        raise VideoError(
            f"the frames of a video have several sizes, {width} × {height} and {other_width} × {other_height}: give "
            "them one size, or show them as images"
        )
    return np.stack(decoded)


def _checked(frames: NDArray[np.uint8], times: NDArray[np.float64], rate: float | None) -> Clip:
    count, height, width = frames.shape[:3]
    if count < 2:
        raise VideoError("a video of one frame shows no time: show it as an image")
    if count * height * width > MAX_PIXELS:
        raise VideoError(
            f"a video of {count} frames of {width} × {height} is larger than {MAX_PIXELS} pixels in all: shrink it"
        )
    if times.shape != (count,) or not np.isfinite(times).all() or (np.diff(times) < 0).any() or times[0] < 0:
        raise VideoError(f"the times of a video are not {count} ascending numbers of seconds")
    span = float(times[-1] - times[0])
    if rate is None and span == 0:
        raise VideoError("all frames of a video are shown at the same time")
    return Clip(frames, times, rate if rate is not None else (count - 1) / span)
