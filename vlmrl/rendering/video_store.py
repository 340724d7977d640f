"""The videos of one renderer: each distinct clip is processed once, and becomes one `VideoItem`.

Video part ──decode──▶ Clip: frames [T, H, W, 3], times [T] ──hash──▶ known? ──process──▶ VideoItem
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np

from vlmrl.rendering.images import image_errors, image_hash
from vlmrl.rendering.item_store import ItemStore, Processed
from vlmrl.rendering.videos import Clip, VideoError, decode_video
from vlmrl.types import IntArray, Video, VideoItem


class ProcessVideo(Protocol):
    """How a chat format makes videos: which frames it chooses, and what the processor makes of them."""

    sampled_rate: float
    """Frames per second of a video that comes sampled already."""

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

    def _at_once(self, part: Video) -> VideoItem | None:
        return self._find(self._hash_of_part.get(part))

    def _item(self, part: Video) -> VideoItem:
        if self._process is None:
            raise VideoError(self._refusal)
        with image_errors(part.source):
            clip = decode_video(part, self._process.choose, self._process.sampled_rate)
        hashes = tuple(image_hash(frame) for frame in clip.frames)
        digest = video_hash(hashes, clip.times, clip.rate)
        process = self._process
        item = self._intern(digest, lambda: self._made(process, digest, hashes, clip))
        self._hash_of_part[part] = item.hash
        return item

    def _made(self, process: ProcessVideo, digest: str, hashes: tuple[str, ...], clip: Clip) -> VideoItem:
        """The item of a clip, by the processor. Its arrays cannot be written to."""
        mm_kwargs, num_tokens, replacement = process(clip)
        arrays: list[np.ndarray] = [clip.frames, clip.times, *mm_kwargs.values()]
        for array in arrays:
            array.setflags(write=False)
        size = self._processed_size(mm_kwargs)
        return VideoItem(digest, clip.frames, clip.times, clip.rate, hashes, mm_kwargs, num_tokens, size, replacement)


def video_hash(frame_hashes: tuple[str, ...], times: np.ndarray, rate: float) -> str:
    """32 hex characters: SHA-256 of the hashes of the frames, of their times and of their rate.

    >>> video_hash(("4d7fc975f0b1832b9a3356b0492f265a",) * 2, np.array([0.0, 0.5]), 2.0)
    '97b8ed12be54fc9479cb719d04df935a'
    """
    digest = hashlib.sha256("".join(frame_hashes).encode())
    digest.update(np.array([*times, rate], np.float64).tobytes())
    return digest.hexdigest()[:32]
