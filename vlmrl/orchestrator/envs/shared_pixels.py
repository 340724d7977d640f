"""Pixels that a worker process hands to the run through shared memory, while messages go through a pipe.

    worker: Image(source) ─▶ decode ─▶ SharedPixels.put ─▶ InShared ─── pipe ───▶ run: SharedPixels.take ─▶ Image(array)
                                            └──────── memory of both ────────────────────┘

A video goes frame by frame; a file of one is read by the run.

The memory is an anonymous file (memfd): it has no name, so nothing is left behind when a process is killed, and it does
not count against /dev/shm, which is 64 MB in a container. Both processes take turns: the run has taken the pixels of
all answers before it sends the next requests, so a worker starts at the front again with each batch.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing import reduction
from typing import Any

import numpy as np

from vlmrl.rendering.images import Pixels, VideoError, decode
from vlmrl.rendering.videos import is_encoded
from vlmrl.tasks.base import Reply
from vlmrl.types import Image, Text, Video

SMALLEST_BYTES = 1 << 20
"""Size of the file when the first image is put into it; it doubles until the images of a batch fit."""


MAX_VIDEO_BYTES = 1 << 30
"""The most bytes of all frames of one video."""


@dataclass(frozen=True)
class InShared:
    """Where the pixels of an image are: uint8 [H, W, 3] in C order."""

    offset: int
    height: int
    width: int


class SharedPixels:
    """One file of pixels. Pickled only while a process is started, which then shares it."""

    def __init__(self, fd: int | None = None) -> None:
        self._fd = os.memfd_create("vlmrl pixels") if fd is None else fd
        self._memory: mmap.mmap | None = None
        self._used = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return _of_duplicate, (reduction.DupFd(self._fd),)

    def clear(self) -> None:
        """Put the next image at the front."""
        self._used = 0

    def put(self, pixels: Pixels) -> InShared:
        """Copy an image into the file."""
        offset, end = self._used, self._used + pixels.nbytes
        size = os.fstat(self._fd).st_size
        if end > size:
            os.ftruncate(self._fd, max(end, 2 * size, SMALLEST_BYTES))
        self._view(offset, pixels.nbytes)[:] = pixels.reshape(-1)
        self._used = end
        return InShared(offset, pixels.shape[0], pixels.shape[1])

    def take(self, place: InShared) -> Pixels:
        """A copy of an image in the file."""
        shape = (place.height, place.width, 3)
        return self._view(place.offset, place.height * place.width * 3).reshape(shape).copy()

    def close(self) -> None:
        """Release the memory of this process."""
        if self._memory is not None:
            self._memory.close()
            self._memory = None
        os.close(self._fd)

    def _view(self, offset: int, size: int) -> np.ndarray:
        if self._memory is None or len(self._memory) < offset + size:
            self._memory = mmap.mmap(self._fd, os.fstat(self._fd).st_size)  # the other process may have made it larger
        return np.frombuffer(self._memory, np.uint8, size, offset)


def _of_duplicate(fd: Any) -> SharedPixels:
    return SharedPixels(fd.detach())


def put_pixels(value: Any, shared: SharedPixels) -> Any:
    """A Reply or a tuple of messages with `InShared` in place of pixels. Raises `ImageError`."""

    def place(part: Image | Video) -> Image | Video:
        source: Any = part.source
        if is_encoded(source):
            return part
        if isinstance(part, Image):
            return Image(shared.put(decode(source)))
        return Video(_put_frames(source, shared), fps=part.fps, times=part.times)

    return _with_parts(value, place)


def _put_frames(frames: Any, shared: SharedPixels) -> tuple[InShared, ...]:
    """The frames of a video, one by one. Raises `ImageError`."""
    if not isinstance(frames, np.ndarray | Sequence):
        raise VideoError(
            f"a video must be a path, bytes, a uint8 array [T, H, W, 3] or a sequence of frames, not "
            f"{type(frames).__name__}"
        )
    placed, size = [], 0
    for frame in frames:
        pixels = decode(frame)
        size += pixels.nbytes
        if size > MAX_VIDEO_BYTES:
            raise VideoError(
                f"the frames of a video have more than {MAX_VIDEO_BYTES >> 20} MiB, too many to hand over from a "
                "worker process: show fewer or smaller ones, or hand over a file"
            )
        placed.append(shared.put(pixels))
    return tuple(placed)


def take_pixels(value: Any, shared: SharedPixels) -> Any:
    """The same with arrays in place of `InShared`."""

    def taken(part: Image | Video) -> Image | Video:
        source: Any = part.source
        if is_encoded(source):
            return part
        if isinstance(part, Image):
            return Image(shared.take(source))
        return Video(tuple(shared.take(frame) for frame in source), fps=part.fps, times=part.times)

    return _with_parts(value, taken)


def _with_parts(value: Any, change: Callable[[Image | Video], Image | Video]) -> Any:
    if isinstance(value, Reply):
        history = None if value.history is None else _with_parts(value.history, change)
        return replace(value, messages=_with_parts(value.messages, change), history=history)
    return tuple(
        replace(message, content=tuple(part if isinstance(part, Text) else change(part) for part in message.content))
        for message in value
    )
