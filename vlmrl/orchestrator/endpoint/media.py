"""Images and videos of chat requests. A client sends all of a conversation again with each request, as data URLs: each
distinct URL is decoded from base64 once and becomes one `Image` or `Video` part, so that it is decoded and hashed once.

    data:image/png;base64,…                      an image
    data:video/mp4;base64,…                      a video file
    data:video/jpeg;base64,<frame>,<frame>,…     the frames of a video, encoded one by one (vLLM's form)

Left out on purpose: URLs of web servers and files (a rollout must not depend on a web server, and a program must not
read the files of the run).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Sequence
from typing import TypeVar

from vlmrl.caches.lru import ByteLRU
from vlmrl.orchestrator.endpoint.refusal import RefusedError
from vlmrl.rendering.data_urls import FRAMES_TYPE
from vlmrl.types import Image, Modality, Video

PartT = TypeVar("PartT", Image, Video)

RECENT_BYTES = 256 << 20
"""Encoded images and videos that are kept: those that were used last."""

MOST_FRAMES = 1 << 16
"""Frames of one data URL."""

_LIKE = {"image": "data:image/png;base64,…", "video": "data:video/mp4;base64,…"}


class DataMedia:
    """`Image` and `Video` parts by their data URLs. Thread-safe."""

    def __init__(self) -> None:
        self._images: ByteLRU[bytes, Image] = ByteLRU(RECENT_BYTES, keep_newest=True)
        self._videos: ByteLRU[bytes, Video] = ByteLRU(RECENT_BYTES, keep_newest=True)

    def image(self, url: str, param: str) -> Image:
        """The image of a data URL; equal URLs give the same part. Raises `RefusedError`, which names `param`.

        >>> media = DataMedia()
        >>> media.image("data:image/png;base64,iVBORw==", "url") is media.image("data:image/png;base64,iVBORw==", "url")
        True
        """
        _, data = _split(url, param, "image")
        key = _digest(data)
        part = self._images.get(key)
        if part is None:
            source = _decoded(data, param, "image")
            part = Image(source)
            self._images.put(key, part, len(source))
        return part

    def video(self, url: str, param: str, *, fps: float | None = None, times: Sequence[float] | None = None) -> Video:
        """The video of a data URL; equal URLs give the same part. `fps` and `times` are those of `Video`, for frames.
        Raises `RefusedError`, which names `param`.

        >>> DataMedia().video("data:video/jpeg;base64,/9j/,/9j/", "url", fps=2.0).source
        (b'\\xff\\xd8\\xff', b'\\xff\\xd8\\xff')
        """
        media_type, data = _split(url, param, "video")
        is_frames = media_type == FRAMES_TYPE
        if not is_frames and (fps is not None or times is not None):
            raise RefusedError(
                f"fps and times next to {param} say when frames are shown, and a video file says that itself: leave "
                f"them out, or send frames as data:{FRAMES_TYPE};base64,…",
                param=param,
            )
        if is_frames and data.count(",") >= MOST_FRAMES:
            raise RefusedError(f"{param} has more than {MOST_FRAMES} frames: send fewer", param=param)
        key = _digest(f"{media_type} {fps!r} {times!r} {data}")
        part = self._videos.get(key)
        if part is None:
            pieces = tuple(_decoded(piece, param, "video") for piece in (data.split(",") if is_frames else [data]))
            part = Video(pieces if is_frames else pieces[0], fps=fps, times=times)
            self._videos.put(key, part, sum(map(len, pieces)))
        return part


def _split(url: str, param: str, kind: Modality) -> tuple[str, str]:
    """The media type of a data URL, in lower case, and its content in base64."""
    header, comma, data = url.partition(",")
    if not header.startswith("data:"):
        raise RefusedError(
            f"{param} is no data URL, and {kind}s are not fetched: send it as {_LIKE[kind]}", param=param
        )
    if not comma or not header.endswith(";base64"):
        raise RefusedError(
            f"{param} is not encoded in base64: send it as {_LIKE[kind]}", param=param, code=f"bad_{kind}"
        )
    return header.removeprefix("data:").partition(";")[0].strip().lower(), data


def _digest(data: str) -> bytes:
    return hashlib.blake2b(data.encode(), digest_size=16).digest()


def _decoded(data: str, param: str, kind: Modality) -> bytes:
    try:
        return base64.b64decode("".join(data.split()), validate=True)  # some encoders break lines
    except (binascii.Error, ValueError) as error:
        raise RefusedError(
            f"{param} is no valid base64 ({error}): encode the bytes of the {kind} file",
            param=param,
            code=f"bad_{kind}",
        ) from None
