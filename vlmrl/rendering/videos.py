"""Frames of a `Video` part, whatever it is handed in as, and whatever is wrong with it.

    path, bytes ───────────────────▶ when each frame is shown (video_files.py) ─┐
    uint8 [T, H, W, 3], T frames ──▶ i / fps ───────────────────────────────────┼─choose─▶ Clip
                    no fps ────────▶ all are shown ─────────────────────────────┘           every fault: VideoError

The family's own rule chooses the frames (`ChooseFrames`), from how many there are and how many are shown a second.
Frames become pixels as images do (images.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from vlmrl.rendering.images import VideoError, decode
from vlmrl.rendering.video_files import ChooseFrames, check_clip, read_frames
from vlmrl.types import Video


@dataclass(frozen=True, eq=False)
class Clip:
    """The frames of a video that the policy is shown."""

    frames: NDArray[np.uint8]
    """uint8 [T, H, W, 3]; RGB, 0 to 255."""
    times: NDArray[np.float64]
    """float64 [T]; when each frame is shown, in seconds from the beginning of the video, ascending."""
    rate: float
    """Frames of this clip per second, on average over the video."""


def is_encoded(source: Any) -> bool:
    """Whether the source of a video is a file or its bytes."""
    return isinstance(source, bytes | str | Path)


def decode_file(video: Video, file: BinaryIO, choose: ChooseFrames, max_frames: int) -> Clip:
    """The chosen frames of a video file. Raises `VideoError`."""
    if video.fps is not None or video.times is not None:
        raise VideoError("a video file says itself when its frames are shown: leave fps and times out")
    return _checked(*read_frames(file, choose), max_frames)


def decode_frames(video: Video, choose: ChooseFrames, sampled_rate: float, max_frames: int) -> Clip:
    """The chosen frames of an array or of a sequence of frames. `sampled_rate` is how many frames a second a video has
    that comes sampled already. Raises `VideoError`.

    >>> clip = decode_frames(Video(np.zeros((6, 8, 8, 3), np.uint8), fps=2.0), lambda n, rate: np.arange(0, n, 2), 1, 4)
    >>> len(clip.frames), clip.times.tolist(), clip.rate
    (3, [0.0, 1.0, 2.0], 1.0)
    """
    source: Any = video.source
    if not isinstance(source, np.ndarray | Sequence):
        raise VideoError(
            "a video must be a path, bytes, a uint8 array [T, H, W, 3] or a sequence of frames, not "
            f"{type(source).__name__}"
        )
    if isinstance(source, np.ndarray) and (source.dtype != np.uint8 or source.ndim != 4 or source.shape[3] != 3):
        raise VideoError(f"a video array must be uint8 [T, H, W, 3], not {source.dtype} {list(source.shape)}")
    count = len(source)
    if count == 0:
        raise VideoError("a video has no frame")
    if count == 1:
        raise VideoError("a video of one frame shows no time: show it as an image")
    if video.times is None and video.fps is not None:
        if not 0 < video.fps < np.inf:
            raise VideoError(f"a video of fps={video.fps} has no duration")
        chosen = choose(count, video.fps)
        times, rate = chosen / video.fps, len(chosen) / count * video.fps
        return _checked(_stacked([source[index] for index in chosen.tolist()]), times, rate, max_frames)
    _check_count(count, max_frames)
    frames = _stacked(source)
    if video.times is None:
        return _checked(frames, np.arange(count) / sampled_rate, sampled_rate, max_frames)
    times = np.array(video.times, np.float64)
    if times.shape != (count,) or not np.isfinite(times).all() or (np.diff(times) < 0).any() or times[0] < 0:
        raise VideoError(f"the times of a video are not {count} ascending numbers of seconds")
    span = float(times[-1] - times[0])
    if video.fps is None and span == 0:
        raise VideoError("all frames of a video are shown at the same time")
    return _checked(frames, times, video.fps if video.fps is not None else (count - 1) / span, max_frames)


def _stacked(source: Sequence[Any] | NDArray[np.uint8]) -> NDArray[np.uint8]:
    """uint8 [T, H, W, 3] of frames that must have one size."""
    decoded = [decode(frame) for frame in source]
    sizes = {frame.shape[:2] for frame in decoded}
    if len(sizes) > 1:
        (height, width), (other_height, other_width) = sorted(sizes)[:2]
        raise VideoError(
            f"the frames of a video have several sizes, {width} × {height} and {other_width} × {other_height}: give "
            "them one size, or show them as images"
        )
    height, width = decoded[0].shape[:2]
    check_clip(len(decoded), width, height)
    return np.stack(decoded)


def _checked(frames: NDArray[np.uint8], times: NDArray[np.float64], rate: float, max_frames: int) -> Clip:
    """A clip within the budget of a video."""
    if len(frames) < 2:
        raise VideoError("one frame of the video would be shown, which shows no time: raise model.vlm.video.fps")
    _check_count(len(frames), max_frames)
    return Clip(np.ascontiguousarray(frames), times, rate)


def _check_count(count: int, max_frames: int) -> None:
    if count > max_frames:
        raise VideoError(
            f"a video shows {count} frames, more than model.vlm.video.max_frames={max_frames}: show fewer of them, or "
            "raise max_frames"
        )
