"""The videos of one renderer: each distinct clip is processed once, and becomes one `VideoItem`.

    Video part ──decode──▶ Clip: frames [T, H, W, 3], times [T] ──hash──▶ known? ──process──▶ VideoItem

A file is decoded once, however often and under whatever name it is shown, as long as its item is alive: it is
recognized by its content. A file that changes while it is read is refused.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, Protocol

import numpy as np

from vlmrl.caches.lru import ByteLRU
from vlmrl.rendering.images import VideoError, image_errors, image_hash, lock_of
from vlmrl.rendering.item_store import ItemStore, Processed
from vlmrl.rendering.video_files import check_installed, content_hash, open_video
from vlmrl.rendering.videos import Clip, decode_file, decode_frames, is_encoded
from vlmrl.types import IntArray, Video, VideoItem

FILE_HASH_BYTES = 65536 * (32 + 32)
"""Memory for the hashes of files: room for 65,536 pairs of SHA-256 digest and video hash."""


class ProcessVideo(Protocol):
    """How a chat format makes videos: which frames it chooses, and what the processor makes of them."""

    sampled_rate: float
    """Frames per second of a video that comes sampled already."""
    max_frames: int
    """The most frames of a video."""

    def load(self) -> None:
        """Load what videos need, before the first of them. Raises `ModelError` and `ConfigError`."""
        ...

    def choose(self, total: int, rate: float) -> IntArray:
        """`ChooseFrames`."""
        ...

    def __call__(self, clip: Clip) -> Processed:
        """What the processor makes of a clip. Raises `VideoError`."""
        ...


class VideoStore(ItemStore[Video, VideoItem]):
    """The videos of one renderer."""

    def __init__(
        self,
        process: ProcessVideo | None,
        processed_size: Callable[[Mapping[str, np.ndarray]], tuple[int, int] | None] = lambda mm_kwargs: None,
        refusal: str = "",
    ) -> None:
        """`process` is None where the model or the renderer takes no videos; `refusal` says why and what to do."""
        super().__init__("videos")
        self._process = process
        self._processed_size = processed_size
        self._refusal = refusal
        self._hash_of_file: ByteLRU[bytes, str] = ByteLRU(FILE_HASH_BYTES)

    def _at_once(self, part: Video) -> VideoItem | None:
        return self._find(self._hash_of_part.get(part))

    def _item(self, part: Video) -> VideoItem:
        process = self._process
        if process is None:
            raise VideoError(self._refusal)
        process.load()  # what is not installed is no fault of the video, so it is asked for outside of the fence
        if is_encoded(part.source):
            check_installed()
        with image_errors(part.source, VideoError):
            item = self._of_file(part, process) if is_encoded(part.source) else self._of_frames(part, process)
        self._hash_of_part[part] = item.hash
        return item

    def _of_frames(self, part: Video, process: ProcessVideo) -> VideoItem:
        clip = decode_frames(part, process.choose, process.sampled_rate, process.max_frames)
        return self._interned(clip, process)

    def _of_file(self, part: Video, process: ProcessVideo) -> VideoItem:
        source: Any = part.source
        with open_video(source) as file:
            before = _status(file)
            key = content_hash(file)
            with lock_of(key):  # sibling rollouts open the same file, and all but one wait here
                item = self._find(self._hash_of_file.get(key))
                if item is not None:
                    return item
                clip = decode_file(part, file, process.choose, process.max_frames)
                if _status(file) != before:
                    raise VideoError("it changed while it was read")
                item = self._interned(clip, process)
                self._hash_of_file.put(key, item.hash, len(key) + len(item.hash))
        return item

    def _interned(self, clip: Clip, process: ProcessVideo) -> VideoItem:
        hashes = tuple(image_hash(frame) for frame in clip.frames)
        digest = video_hash(hashes, clip.times, clip.rate)
        return self._intern(digest, lambda: self._made(process, digest, hashes, clip))

    def _made(self, process: ProcessVideo, digest: str, hashes: tuple[str, ...], clip: Clip) -> VideoItem:
        """The item of a clip, by the processor. Its arrays cannot be written to."""
        mm_kwargs, num_tokens, replacement = process(clip)
        arrays: list[np.ndarray] = [clip.frames, clip.times, *mm_kwargs.values()]
        for array in arrays:
            array.setflags(write=False)
        size = self._processed_size(mm_kwargs)
        return VideoItem(digest, clip.frames, clip.times, clip.rate, hashes, mm_kwargs, num_tokens, size, replacement)


def _status(file: BinaryIO) -> tuple[int, int, int] | None:
    """What changes when a file is written to; None for bytes."""
    try:
        status = os.fstat(file.fileno())
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def video_hash(frame_hashes: tuple[str, ...], times: np.ndarray, rate: float) -> str:
    """32 hex characters: SHA-256 of the hashes of the frames, of their times and of their rate.

    >>> video_hash(("4d7fc975f0b1832b9a3356b0492f265a",) * 2, np.array([0.0, 0.5]), 2.0)
    '97b8ed12be54fc9479cb719d04df935a'
    """
    digest = hashlib.sha256("".join(frame_hashes).encode())
    digest.update(np.array([*times, rate], np.float64).tobytes())
    return digest.hexdigest()[:32]
