"""The content of a video by itself, without a model that says which of its frames are shown.

    path, bytes ──▶ SHA-256 of the file, and its first two frames are decoded ─┐
    frames ───────▶ all of them are decoded; their hashes, fps and times ──────┴──▶ 32 hex characters

By it a data set tells which rows show the same video, and the check of a task compares what two envs show. A copy that
was encoded again is another video.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from vlmrl.rendering.images import VideoError, image_errors, image_hash
from vlmrl.rendering.video_files import check_installed, content_hash, open_video, read_frames
from vlmrl.rendering.videos import decode_frames, is_encoded
from vlmrl.types import IntArray, Video

MOST_FRAMES = 1 << 16
"""The most frames of a list or an array."""


def video_content(video: Video) -> str:
    """The hash of a video that can be shown. Raises `VideoError`, and `ModelError` where PyAV is missing.

    >>> frames = np.zeros((2, 8, 8, 3), np.uint8)
    >>> video_content(Video(frames)) == video_content(Video(list(frames))), len(video_content(Video(frames, fps=2.0)))
    (True, 32)
    >>> video_content(Video(frames)) == video_content(Video(frames, fps=2.0))
    False
    """
    source: Any = video.source
    if is_encoded(source):
        check_installed()  # what is not installed is no fault of the video
    with image_errors(source, VideoError):
        if is_encoded(source):
            if video.fps is not None or video.times is not None:
                raise VideoError("a video file says itself when its frames are shown: leave fps and times out")
            with open_video(source) as file:
                digest = content_hash(file)
                read_frames(file, _first_two)
            return digest.hex()[:32]
        clip = decode_frames(video, _all, 1.0, MOST_FRAMES)
        times = None if video.times is None else clip.times.tolist()
        made = hashlib.sha256("".join(image_hash(frame) for frame in clip.frames).encode())
        made.update(repr((None if video.fps is None else float(video.fps), times)).encode())
        return made.hexdigest()[:32]


def _first_two(total: int, rate: float) -> IntArray:
    return np.arange(min(total, 2))


def _all(total: int, rate: float) -> IntArray:
    return np.arange(total)
