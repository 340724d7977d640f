"""Videos from the cells of a row, whatever form they have.

    cell ──cells_of──▶ VideoCell ──┬─ a list of frames ──▶ images.py ──▶ uint8 [T, H, W, 3] ─┐
                                   └─ path, bytes, text ─▶ files.py ──▶ first two frames ────┴─▶ LoadedVideo

The first two frames of a file are decoded, so that a row with a broken file is a bad row. The others are decoded where
the prompt is rendered (`vlmrl.rendering.videos`). Whatever is wrong with a cell is `Unusable`, with the reason.

Rows may set how their video is sampled and scaled (`fps`, `nframes`, `max_pixels` …, as in qwen-vl-utils). A run treats
all videos alike, by `model.vlm.video`: these are refused by name, or ignored with `task.ignore_video_settings`. For a
list of frames, `sample_fps` or `fps` says how many of them are shown a second, and `times` when each is shown, as in
the rollouts of a run; these are honoured.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import urlsplit

import numpy as np
from PIL import Image as PILImage

from vlmrl.caches.lru import ByteLRU
from vlmrl.errors import ModelError
from vlmrl.rendering.images import ImageError, Pixels, image_hash
from vlmrl.rendering.video_content import video_content
from vlmrl.rendering.video_files import MAX_CLIP_PIXELS
from vlmrl.tasks.dataset.columns import Unusable, as_list, is_missing, parsed, plain, short
from vlmrl.tasks.dataset.files import MAGIC, Files, Place
from vlmrl.tasks.dataset.images import ImageReader
from vlmrl.types import Video

CONTENT_KEYS = (
    *("bytes", "video", "video_url", "frames", "url", "data", "base64", "path", "file", "file_name", "filename"),
    "source",
)
"""Where dictionaries have the video: `{bytes, path}` of `datasets`, `{url}` of OpenAI, `{video}` of TRL and Qwen."""

SETTINGS = (
    *("fps", "sample_fps", "raw_fps", "nframes", "num_frames", "min_frames", "max_frames", "min_pixels", "max_pixels"),
    *("total_pixels", "resized_height", "resized_width"),
)
"""How a row's video is sampled and scaled, by the names of qwen-vl-utils, verl and ms-swift."""

TIMES = "times"
"""The seconds at which the frames of a list are shown."""

CUTS = ("video_start", "video_end", "start_time", "end_time")
"""Seconds of a part of a video."""

FILE_ENDINGS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".flv", ".wmv", ".mpg", ".mpeg", ".ts", ".3gp", ".ogv")
"""How the names of video files end."""

_FRAME_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")

_NO_PICTURE = re.compile(rb"\0\0\0.ftyp(?!avif|avis|hei[cfmsx]|hev[cx]|mif1|msf1)|RIFF....AVI ", re.DOTALL)
"""How MP4 and AVI files begin. AVIF, HEIC and WebP pictures begin alike, with other names."""

KNOWN_FILES_BYTES = 1 << 20
"""Size of the table of files that were looked at before: about 10,000 of them."""


@dataclass(frozen=True)
class VideoCell:
    """One video of a row, before it is read."""

    source: Any
    """A path or URL as text, encoded bytes, an array, or a tuple of frames, which are cells of images."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What the row sets for it, by the names of `SETTINGS`, `CUTS` and `TIMES`."""


@dataclass(frozen=True, eq=False)
class LoadedVideo:
    """A video that can be shown."""

    part: Video
    hash: str
    """32 hex characters that stand for its content: of the bytes of its file, or of its frames and their times."""


Media: TypeAlias = Pixels | LoadedVideo
"""What stands in the place of a marker: an image or a video."""


def media_hash(media: Media) -> str:
    """The hash of an image, or of a video."""
    return media.hash if isinstance(media, LoadedVideo) else image_hash(media)


# ── cells ───────────────────────────────────────────────────────────────────────────────────────────────────


def cells_of(cell: Any, settings: Mapping[str, Any] | None = None) -> Iterator[VideoCell]:
    """The single videos of a cell. A list of frames is one video, any other list holds several. Raises `Unusable`.

    >>> [each.source for each in cells_of(["a.mp4", {"bytes": None, "path": "b.mp4"}])]
    ['a.mp4', 'b.mp4']
    >>> [each.source for each in cells_of([["0.jpg", "1.jpg"], ["2.jpg", "3.jpg"]])]
    [('0.jpg', '1.jpg'), ('2.jpg', '3.jpg')]
    >>> next(cells_of({"type": "video", "video": "a.mp4", "fps": 2.0}))
    VideoCell(source='a.mp4', settings={'fps': 2.0})
    """
    settings = settings or {}
    if isinstance(cell, np.ndarray) and cell.dtype != object:
        yield VideoCell(cell, settings)
        return
    cell = plain(cell)
    if isinstance(cell, str):
        found = parsed(cell) if re.fullmatch(r"\s*(\[.*\]|\{.*\})\s*", cell, re.DOTALL) else cell
        if not isinstance(found, str):
            yield from cells_of(found, settings)
        elif found.strip():
            yield VideoCell(found, settings)
    elif isinstance(cell, bytes | bytearray | memoryview):
        yield VideoCell(bytes(cell), settings)
    elif isinstance(cell, Mapping):
        yield from _of_struct(cell, settings)
    elif isinstance(cell, list | tuple):
        yield from _of_list([item for item in cell if not is_missing(item)], settings)
    elif cell is not None:
        raise Unusable(f"a video is {short(cell)}, a {type(cell).__name__}: it must be a path, bytes, or a data URL")


def _of_struct(cell: Mapping[str, Any], settings: Mapping[str, Any]) -> Iterator[VideoCell]:
    own = {name: cell[name] for name in (*SETTINGS, *CUTS, TIMES) if not is_missing(cell.get(name))}
    found = next((cell[key] for key in CONTENT_KEYS if cell.get(key) is not None), None)
    if found is None and any(value is not None for value in cell.values()):
        raise Unusable(f"a video is a struct of {', '.join(map(str, cell))}, and none of them is known to hold it")
    yield from cells_of(found, {**settings, **own})


def _of_list(items: Sequence[Any], settings: Mapping[str, Any]) -> Iterator[VideoCell]:
    frames = [_is_frame(item) for item in items]
    if items and all(frames):
        yield VideoCell(tuple(items), settings)
    elif any(frames):
        raise Unusable(
            f"a list holds {sum(frames)} pictures and {len(items) - sum(frames)} videos, so it is not clear what is a "
            "frame: give each video a list of its own"
        )
    else:
        for item in items:
            yield from cells_of(item, settings)


def _is_frame(item: Any) -> bool:
    """Whether an item of a list is a picture, and not a video."""
    if isinstance(item, np.ndarray) and item.dtype != object:
        return item.ndim == 3
    if isinstance(item, PILImage.Image):
        return True
    if isinstance(item, Mapping):
        content = next((item[key] for key in ("image", "image_url", *CONTENT_KEYS) if item.get(key) is not None), None)
        return _is_frame(content)
    if isinstance(item, bytes):
        return MAGIC["image"].match(item) is not None and _NO_PICTURE.match(item) is None
    if isinstance(item, str):
        text = item.strip().lower()
        return text.startswith("data:image/") or _ending(text).endswith(_FRAME_ENDINGS)
    return False


def names_a_file(text: Any) -> bool:
    """Whether a text ends as the names of video files do.

    >>> names_a_file("clips/a.MP4"), names_a_file("https://host/a.webm?x=1"), names_a_file("a.png")
    (True, True, False)
    """
    return isinstance(text, str) and _ending(text.strip().lower()).endswith(FILE_ENDINGS)


def _ending(text: str) -> str:
    """The end of a path, or of the path of a URL."""
    try:
        return (urlsplit(text).path if re.match(r"https?://", text) else text)[-16:]
    except ValueError:
        return ""


# ── reading ─────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class VideoReader:
    """Reads the video cells of one data set. Thread-safe."""

    root: Path | None
    """`task.video_root`; None: paths start at the folder of the row's file."""
    fetch: bool
    """Whether http(s) URLs are downloaded."""
    ignores_settings: bool = False
    """Whether `SETTINGS` of rows are ignored (`task.ignore_video_settings`)."""
    known: ByteLRU[tuple[str, int, int], str] = field(default_factory=lambda: ByteLRU(KNOWN_FILES_BYTES))
    """Path, size and time of a file that was looked at → its hash."""

    def load(self, cell: VideoCell, place: Place) -> LoadedVideo:
        """Read a video. Raises `Unusable`."""
        self._check_settings(cell)
        source = cell.source
        if isinstance(source, tuple | np.ndarray):
            return self._of_frames(source, cell, place)
        if isinstance(source, str):
            source = Files("video", self.root, "task.video_root", self.fetch).content(source, place)
        return self._of_file(source)

    def _check_settings(self, cell: VideoCell) -> None:
        is_sampled = isinstance(cell.source, tuple | np.ndarray)
        for name, value in cell.settings.items():
            if name in CUTS:
                raise Unusable(
                    f"the row shows a part of its video only ({name}={short(value)}), and videos are shown from their "
                    "beginning to their end: cut the file"
                )
            if self.ignores_settings or (is_sampled and name in ("fps", "sample_fps", "raw_fps", TIMES)):
                continue
            key = {"nframes": "num_frames", "sample_fps": "fps"}.get(name, name)
            fits = key in ("fps", "num_frames", "max_frames", "min_pixels", "max_pixels")
            remedy = f"set model.vlm.video.{key} for all videos, and " if fits else "set "
            raise Unusable(
                f"the row sets {name}={short(value)} for its video, and a run samples and scales all videos alike: "
                f"{remedy}task.ignore_video_settings=true"
            )

    def _of_frames(self, source: Any, cell: VideoCell, place: Place) -> LoadedVideo:
        """A video of frames that are sampled already."""
        reader = ImageReader(self.root, self.fetch, "task.video_root")
        frames: list[Pixels] = []
        for number, frame in enumerate(source):
            found = reader.pixels(frame, place)
            if len(found) != 1:
                raise Unusable(f"frame {number} of a video is {len(found)} images: give each frame one")
            frames += found
            if len(frames) * found[0].shape[0] * found[0].shape[1] > MAX_CLIP_PIXELS:
                raise Unusable(f"the frames of a video have more than {MAX_CLIP_PIXELS} pixels in all: shrink them")
        rate, times = _rate(cell), _times(cell)
        if rate is not None and times is None:
            times, rate = tuple(number / rate for number in range(len(frames))), None
        part = Video(frames, fps=rate, times=times)
        return LoadedVideo(part, _looked_at(part))

    def _of_file(self, source: bytes | Path) -> LoadedVideo:
        """A file that was looked at before is recognized by its path, size and time."""
        state = source.stat() if isinstance(source, Path) else None
        key = None if state is None else (str(source), state.st_size, state.st_mtime_ns)
        digest = None if key is None else self.known.get(key)
        if digest is None:
            digest = _looked_at(Video(source))
            if key is not None:
                self.known.put(key, digest, 64 + len(key[0]))
        return LoadedVideo(Video(source), digest)


def _looked_at(part: Video) -> str:
    """The hash of a video that can be shown. Raises `Unusable`."""
    try:
        return video_content(part)
    except ModelError as error:  # PyAV is missing
        raise Unusable(str(error)) from None
    except ImageError as error:
        raise Unusable(f"{error.text}: repair or remove the video") from None


def _rate(cell: VideoCell) -> float | None:
    """Frames a second of a list of frames; None where the row does not say. Raises `Unusable`."""
    name = next((name for name in ("sample_fps", "fps") if name in cell.settings), None)
    if name is None:
        return None
    value = cell.settings[name]
    try:
        rate = float(as_list(value)[0])
    except (TypeError, ValueError, IndexError):
        rate = 0.0
    if not 1e-3 <= rate <= 1e6:
        raise Unusable(f"the row sets {name}={short(value)} for its frames, which is no number of frames a second")
    return rate


def _times(cell: VideoCell) -> tuple[float, ...] | None:
    """When the frames of a list are shown; None where the row does not say. Raises `Unusable`."""
    if TIMES not in cell.settings:
        return None
    try:
        return tuple(float(time) for time in as_list(cell.settings[TIMES]))
    except (TypeError, ValueError):
        raise Unusable(f"the row sets times={short(cell.settings[TIMES])}, which are no numbers of seconds") from None
