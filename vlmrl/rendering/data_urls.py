"""Images and videos as parts of a request of the chat API, with their content in data URLs.

    image                     {"type": "image_url", "image_url": {"url": "data:image/png;base64,…"}}
    video file, its bytes     {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,…"}}
    frames of a video         {"type": "video_url", "video_url": {"url": "data:video/jpeg;base64,…,…", "fps": 8.0}}

Frames are PNG, which keeps every pixel, under the media type by which vLLM knows a list of frames.
"""

from __future__ import annotations

import base64
import io
import mimetypes
from pathlib import Path
from typing import Any

from PIL import Image as PILImage

from vlmrl.rendering.images import Pixels, decode, read_file
from vlmrl.types import Image, Video

FRAMES_TYPE = "video/jpeg"
"""The media type of a data URL that holds the frames of a video, each encoded as an image, with commas between."""


def part_of(part: Image | Video) -> dict[str, Any]:
    """The part of a chat request. Raises `ImageError`.

    >>> import numpy as np
    >>> video = part_of(Video(np.zeros((2, 4, 4, 3), np.uint8), times=(0.0, 0.5)))["video_url"]
    >>> video["url"][:23], video["url"].count(","), video["times"]
    ('data:video/jpeg;base64,', 2, [0.0, 0.5])
    """
    if isinstance(part, Image):
        return {"type": "image_url", "image_url": {"url": png_url(decode(part.source))}}
    source: Any = part.source
    if isinstance(source, bytes | str | Path):
        data = source if isinstance(source, bytes) else read_file(source)
        url = f"data:{_type_of(source)};base64,{base64.b64encode(data).decode()}"
        return {"type": "video_url", "video_url": {"url": url}}
    frames = ",".join(png_base64(decode(frame)) for frame in source)
    shown: dict[str, Any] = {"url": f"data:{FRAMES_TYPE};base64,{frames}"}
    if part.fps is not None:
        shown["fps"] = part.fps
    if part.times is not None:
        shown["times"] = [float(time) for time in part.times]
    return {"type": "video_url", "video_url": shown}


def png_url(pixels: Pixels) -> str:
    """uint8 [H, W, 3] as a data URL of a PNG."""
    return f"data:image/png;base64,{png_base64(pixels)}"


def png_base64(pixels: Pixels) -> str:
    """uint8 [H, W, 3] as PNG, in base64."""
    file = io.BytesIO()
    PILImage.fromarray(pixels).save(file, "PNG", compress_level=1)
    return base64.b64encode(file.getvalue()).decode()


def _type_of(source: bytes | str | Path) -> str:
    """The media type of a file, by its name; readers go by its content."""
    guessed = None if isinstance(source, bytes) else mimetypes.guess_type(str(source))[0]
    return guessed if guessed is not None and guessed.startswith("video/") and guessed != FRAMES_TYPE else "video/mp4"
