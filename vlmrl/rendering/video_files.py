"""Frames of a video file or of its encoded bytes, read with PyAV (FFmpeg's libraries).

    file ──hash──▶ known? ──demux──▶ when each frame is shown ──choose──▶ decode up to the last chosen one ──▶ RGB

A file is read twice: the demuxer tells when each frame is shown without decoding any, and the decoder then runs up to
the last chosen frame and keeps only the chosen ones. So the memory that a video needs depends on the frames that are
shown, not on its length. Pixels and indices are those of transformers' `read_video_pyav`.

What is bounded before anything is decoded: bytes of the file, pixels of a frame, frames and seconds of the video, and
pixels of all chosen frames. FFmpeg reads only the containers of `CONTAINERS`, and opens nothing beside the file that it
is given: playlists and scripts, which name other files or URLs, are refused.

Left out on purpose: sound, subtitles, all video streams but the first, pixels that are not square (they are taken for
square, as transformers does), mirroring, and rotations by other angles than multiples of 90 degrees.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray

from vlmrl.errors import ModelError, fenced
from vlmrl.rendering.images import MAX_PIXELS, VideoError, open_file
from vlmrl.types import IntArray

MAX_FILE_BYTES = 1 << 32
"""Larger files and bytes are refused before they are read (4 GiB)."""

MAX_FILE_FRAMES = 1 << 18
"""A file with more frames is refused before it is decoded (262,144; 2.4 hours at 30 frames a second)."""

MAX_SECONDS = 86_400
"""A video whose last frame is shown later is refused before it is decoded."""

MAX_CLIP_PIXELS = 1 << 28
"""Pixels of all chosen frames of a video together (268 million, 768 MiB): 129 frames of 1920 × 1080."""

MOST_FRAMES_PER_SECOND = 1000
"""The finest timeline on which frames of a video of variable rate are chosen."""

CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,gif,apng"
"""FFmpeg's names of the formats that are read. None of them opens other files."""

_CHUNK_BYTES = 1 << 20


class ChooseFrames(Protocol):
    """The family's rule: which of `total` frames, of which `rate` are shown a second, the policy sees → int64 [T],
    ascending. Raises `VideoError` where they are more than a prompt may hold."""

    def __call__(self, total: int, rate: float) -> IntArray: ...


@dataclass(frozen=True, eq=False)
class Timeline:
    """When the frames of a file are shown."""

    times: NDArray[np.float64]
    """float64 [N]; seconds since the first frame, ascending."""
    end: float
    """Seconds until the last frame is over."""
    rate: float
    """Frames per second, if the rate is constant: frame k is shown from k / `rate` on. 0 if it is variable."""

    def virtual(self) -> tuple[int, float]:
        """(number of frames, frames per second) of the timeline on which frames are chosen. For a video of variable
        rate it is that of a conversion to a constant rate, so fine that it has every frame.

        >>> Timeline(np.array([0.0, 1.0, 1.25]), 2.0, rate=0.0).virtual()
        (8, 4.0)
        """
        if self.rate > 0:
            return len(self.times), self.rate
        gaps = np.diff(self.times)
        rate = min(1 / float(gaps[gaps > 0].min()), float(MOST_FRAMES_PER_SECOND))
        return max(int(np.ceil(self.times[-1] * rate - 1e-6)) + 1, round(self.end * rate)), rate

    def shown_at(self, chosen: IntArray, rate: float) -> IntArray:
        """The frame that is shown at each chosen index of the virtual timeline: int64 [T].

        >>> Timeline(np.array([0.0, 1.0, 1.25]), 2.0, rate=0.0).shown_at(np.array([0, 3, 4, 5, 7]), 4.0).tolist()
        [0, 0, 1, 2, 2]
        """
        if self.rate > 0:
            return chosen
        found: IntArray = np.searchsorted(self.times, chosen / rate + 1e-6, side="right") - 1
        return found


def check_installed() -> None:
    """Raise `ModelError` where PyAV is missing."""
    if find_spec("av") is None:
        raise ModelError(
            "video files are read with av (PyAV), which is not installed, so no video file could be shown: "
            "pip install 'vlmrl[video]'"
        )


@contextmanager
def open_video(source: bytes | str | Path) -> Iterator[BinaryIO]:
    """Encoded bytes, or a regular file of at most `MAX_FILE_BYTES`, for `content_hash` and `read_frames`. Raises
    `VideoError`."""
    if isinstance(source, bytes):
        _check_bytes(len(source))
        yield io.BytesIO(source)
    else:
        with open_file(source, _check_bytes, VideoError) as file:
            yield file


def content_hash(file: BinaryIO) -> bytes:
    """SHA-256 of a file, in chunks. By it a file is recognized that was decoded before: names and times of a change are
    no proof, and a file that is read twice to decode it can be read once more to recognize it."""
    file.seek(0)
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK_BYTES):
        digest.update(chunk)
    return digest.digest()


def read_frames(file: BinaryIO, choose: ChooseFrames) -> tuple[NDArray[np.uint8], NDArray[np.float64], float]:
    """The chosen frames of a video, when each is shown, and how many are shown a second.

    Frames: uint8 [T, H, W, 3], RGB, upright as the file says. Times: float64 [T], k / rate for index k of the timeline
    on which frames are chosen. It is that of the file if its rate is constant. A video of variable rate is treated as
    if it had been converted to a constant rate: a time is then when the frame is looked at, not when it appeared, and a
    frame that stays for long may be chosen several times. Raises `VideoError`.
    """
    with fenced("the decoder", VideoError):
        timeline = _timeline(file)
        total, rate = timeline.virtual()
        chosen = choose(total, rate)
        frames = _decoded(file, timeline.shown_at(chosen, rate))
        return frames, chosen / rate, len(chosen) / total * rate


# ── demux ───────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def _opened(file: BinaryIO) -> Iterator[tuple[Any, Any]]:
    """(the container, its first video stream)."""
    import av

    file.seek(0)
    options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "none", "max_pixels": str(MAX_PIXELS)}
    more: dict[str, Any] = {"buffer_size": _CHUNK_BYTES, "io_open": _refuse_other_files, "metadata_errors": "replace"}
    try:
        container = av.open(_Nameless(file), options=options, **more)
    except av.FFmpegError as error:
        raise VideoError(
            f"it is damaged, or it is in no format that is read here, such as MP4, WebM, MKV or GIF ({error.strerror})"
        ) from None
    with container:
        if not container.streams.video:
            raise VideoError("it has no video stream")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise VideoError("its codec is not known to PyAV")
        _check_frame(stream.codec_context.width, stream.codec_context.height)
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
        stream.codec_context.thread_count = 1  # several videos are decoded at the same time instead
        yield container, stream


class _Nameless:
    """A file without its name, from which FFmpeg would guess the format."""

    def __init__(self, file: BinaryIO) -> None:
        self.read = file.read
        self.seek = file.seek
        self.tell = file.tell


def _refuse_other_files(url: str, flags: int, options: dict[str, str]) -> NoReturn:
    raise VideoError("it names another file or URL: give the video itself")


def _timeline(file: BinaryIO) -> Timeline:
    """When the frames are shown, from the packets."""
    stamps: list[int | None] = []
    last_stamp, last_duration, packets = -1, 0, 0
    with _opened(file) as (container, stream):
        for packet in container.demux(stream):
            if packet.size == 0:
                continue  # the end of the stream
            packets += 1
            if packets > MAX_FILE_FRAMES:
                raise VideoError(f"it has more than {MAX_FILE_FRAMES} frames: cut it")
            if packet.is_discard or _is_hidden(stream.codec_context.name, packet):
                continue
            stamp = packet.pts if packet.pts is not None else packet.dts
            stamps.append(stamp)
            if stamp is not None and stamp >= last_stamp:
                last_stamp, last_duration = stamp, packet.duration or 0
        stated, time_base = stream.frames, stream.time_base
        average = float(stream.average_rate or 0)
    if packets < stated:
        raise VideoError(f"its header states {stated} frames and it has {packets}: it is cut off")
    if len(stamps) < 2:
        raise VideoError("it has one frame, which shows no time: show it as an image" if stamps else "it has no frame")
    if any(stamp is None for stamp in stamps):
        if average <= 0:
            raise VideoError("it does not say when its frames are shown: convert it to MP4")
        times = np.arange(len(stamps)) / average
        return Timeline(times, len(times) / average, average)
    seconds = np.sort(np.array(stamps, np.float64)) * float(time_base)
    times = seconds - seconds[0]
    if not 0 < times[-1] <= MAX_SECONDS:
        raise VideoError(f"its last frame is shown after {times[-1]:.4g} s, which is not in (0, {MAX_SECONDS}]")
    end = float(times[-1]) + (last_duration * float(time_base) or float(times[-1]) / (len(times) - 1))
    return Timeline(times, min(end, 2.0 * MAX_SECONDS), _constant_rate(times, average))


def _constant_rate(times: NDArray[np.float64], average: float) -> float:
    """The rate at which no frame is half a frame too early or too late; 0 for a variable rate. The container's own
    `average` comes first, as transformers takes it.

    >>> _constant_rate(np.array([0.0, 0.033, 0.067, 0.1]), 30.0), _constant_rate(np.array([0.0, 0.1, 1.0]), 2.0)
    (30.0, 0.0)
    """
    for rate in (average, (len(times) - 1) / float(times[-1])):
        if rate > 0 and np.abs(times * rate - np.arange(len(times))).max() < 0.5:
            return rate
    return 0.0


def _is_hidden(codec: str, packet: Any) -> bool:
    """Whether a packet holds a frame of VP8 that is only referred to and never shown (RFC 6386, section 9.1). Other
    codecs pack such frames together with one that is shown."""
    return codec in ("vp8", "libvpx") and not bytes(packet)[0] & 0x10


# ── decode ──────────────────────────────────────────────────────────────────────────────────────────────────


def _decoded(file: BinaryIO, indices: IntArray) -> NDArray[np.uint8]:
    """uint8 [T, H, W, 3]; the frames of these indices in the order in which they are shown."""
    wanted = dict.fromkeys(indices.tolist())
    kept: dict[int, NDArray[np.uint8]] = {}
    number = -1
    with _opened(file) as (container, stream):
        width, height = stream.codec_context.width, stream.codec_context.height
        check_clip(len(indices), width, height)
        for number, frame in enumerate(container.decode(stream)):
            if (frame.width, frame.height) != (width, height):
                raise VideoError(
                    f"its frame {number} has {frame.width} × {frame.height} pixels and the first {width} × {height}: "
                    "convert it to one size"
                )
            if number in wanted:
                kept[number] = _pixels(frame, number)
            if number >= indices[-1]:
                break
    if len(kept) < len(wanted):
        raise VideoError(
            f"frame {indices[-1]} is to be shown and {number + 1} can be decoded: it is cut off or damaged"
        )
    return np.stack([kept[index] for index in indices.tolist()])


def _pixels(frame: Any, number: int) -> NDArray[np.uint8]:
    if frame.is_corrupt:
        raise VideoError(f"its frame {number} is damaged")
    pixels: NDArray[np.uint8] = frame.to_ndarray(format="rgb24")
    turns, rest = divmod(round(frame.rotation), 90)
    return pixels if rest or not turns % 4 else np.rot90(pixels, turns)


# ── bounds ──────────────────────────────────────────────────────────────────────────────────────────────────


def check_clip(count: int, width: int, height: int) -> None:
    """Raise `VideoError` where so many frames of this size are too large together."""
    if count * width * height > MAX_CLIP_PIXELS:
        raise VideoError(
            f"{count} frames of {width} × {height} are more than {MAX_CLIP_PIXELS} pixels in all: shrink the video, or "
            "show fewer frames (model.vlm.video.fps)"
        )


def _check_bytes(num_bytes: int) -> None:
    if num_bytes > MAX_FILE_BYTES:
        raise VideoError(f"a video of {num_bytes} bytes is larger than {MAX_FILE_BYTES} bytes: shrink or cut it")


def _check_frame(width: int, height: int) -> None:
    if not 0 < width * height <= MAX_PIXELS:  # FFmpeg makes 0 × 0 of a larger size
        raise VideoError(f"its frames have no size, or more than {MAX_PIXELS} pixels: shrink it")
