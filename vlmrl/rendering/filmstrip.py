"""A video as one picture for people: some of its frames side by side, with the time of each under it.

┌──────┐┌──────┐┌──────┐
│      ││      ││      │
└──────┘└──────┘└──────┘
  0 s     0.5 s    2 s
"""

from __future__ import annotations

import numpy as np
import PIL.Image
from numpy.typing import NDArray
from PIL import ImageDraw, ImageFont

from vlmrl.types import VideoItem

MOST_FRAMES = 12
"""Frames of a filmstrip, at even distances over the video, the first and the last among them."""
FRAME_HEIGHT = 128
"""Pixels; larger frames are scaled down."""
GAP = 4
"""Pixels between two frames."""
TEXT_HEIGHT = 14
"""Pixels below the frames, for their times."""


def shown_frames(count: int, most: int = MOST_FRAMES) -> list[int]:
    """The numbers of the frames that are shown of a video of `count` frames.

    >>> shown_frames(3), shown_frames(100, 5)
    ([0, 1, 2], [0, 25, 50, 74, 99])
    """
    return [round(place) for place in np.linspace(0, count - 1, min(count, most)).tolist()]


def filmstrip(video: VideoItem, height: int = FRAME_HEIGHT) -> NDArray[np.uint8]:
    """Some frames of a video side by side on white, with their times: uint8 [H, W, 3]."""
    places = shown_frames(len(video.frames))
    pictures = [PIL.Image.fromarray(video.frames[place]) for place in places]
    for picture in pictures:
        picture.thumbnail((picture.width, height))
    width, height = pictures[0].size
    font = ImageFont.load_default()
    labels = [f"{video.times[place]:.4g} s" for place in places]
    step = max(width, *(int(font.getlength(label)) for label in labels)) + GAP
    canvas = PIL.Image.new("RGB", (step * len(places) - GAP, height + TEXT_HEIGHT), "white")
    draw = ImageDraw.Draw(canvas)
    for number, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        canvas.paste(picture, (number * step, 0))
        draw.text((number * step, height + 2), label, fill="black", font=font)
    return np.asarray(canvas)


def described(video: VideoItem) -> str:
    """The size of a video in words.

    >>> frames = np.zeros((3, 48, 32, 3), np.uint8)
    >>> described(VideoItem("ab", frames, np.array([0.0, 0.5, 1.25]), 2.0, (), {}, 2))
    '3 frames of 32 × 48, from 0 to 1.25 s'
    """
    count, height, width = video.frames.shape[:3]
    return f"{count} frames of {width} × {height}, from {video.times[0]:.4g} to {video.times[-1]:.4g} s"
