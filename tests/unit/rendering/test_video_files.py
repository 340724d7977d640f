"""Frames of video files: which ones, with which pixels and times, and what is refused."""

from __future__ import annotations

import hashlib
import io
import os
import random
import struct
import tracemalloc
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image as PILImage

from support.mutations import mutated
from support.video_files import LOSSLESS, encoded, moving
from vlmrl.errors import ModelError
from vlmrl.rendering import video_files
from vlmrl.rendering.images import VideoError, image_errors
from vlmrl.rendering.video_files import MAX_FILE_BYTES, check_installed, open_video
from vlmrl.rendering.videos import Clip, decode_file, decode_frames
from vlmrl.types import IntArray, Video

H264 = ("mp4", "libx264", "yuv420p")


def every(step: int) -> Any:
    return lambda total, rate: np.arange(0, total, step)


ALL = every(1)


def read(source: bytes | str | Path, choose: Any = ALL, max_frames: int = 1000, **said: Any) -> Clip:
    with image_errors(source, VideoError), open_video(source) as file:
        return decode_file(Video(source, **said), file, choose, max_frames)


def two_a_second(total: int, rate: float) -> IntArray:
    """Frames at half a second from each other."""
    return np.arange(0, total - 0.5, rate / 2).round().astype(np.int64)


# ── which frames, and when ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("rate", [10, Fraction(30000, 1001), 3])
def test_frames_of_a_constant_rate_are_numbered_from_zero(rate: Fraction | int, tmp_path: Path) -> None:
    frames = moving(23)
    (tmp_path / "a.mkv").write_bytes(encoded(frames, rate))
    for source in (tmp_path / "a.mkv", str(tmp_path / "a.mkv"), encoded(frames, rate)):
        clip = read(source, every(5))
        np.testing.assert_array_equal(clip.frames, frames[::5])
        np.testing.assert_allclose(clip.times, np.arange(0, 23, 5) / float(rate), rtol=1e-4)
        assert clip.rate == pytest.approx(5 / 23 * float(rate), rel=1e-4)


@pytest.mark.parametrize(
    "kind",
    [
        H264,  # with frames that are stored in another order than they are shown
        ("mov", "mjpeg", "yuvj420p"),
        ("webm", "libvpx", "yuv420p"),
        ("webm", "libvpx-vp9", "yuv420p"),
        ("avi", "mpeg4", "yuv420p"),
        ("mpegts", "libx264", "yuv420p"),
        ("flv", "libx264", "yuv420p"),
        ("gif", "gif", "rgb8"),
        ("apng", "apng", "rgba"),
    ],
)
def test_pixels_and_indices_are_those_of_transformers(kind: tuple[str, str, str], tmp_path: Path) -> None:
    """`read_video_pyav` needs the number of frames in the header, which some containers lack: then every frame."""
    video_utils = pytest.importorskip("transformers.video_utils")
    path = tmp_path / "a"
    path.write_bytes(encoded(moving(12, 34, 50) // 2, 10, kind))
    seen: list[Any] = []

    def sample(metadata: Any, **kwargs: Any) -> IntArray:
        seen.append(metadata)
        return np.array([0, 3, 4, 11])

    expected, metadata = video_utils.read_video_pyav(str(path), sample)
    clip = read(path, lambda total, rate: np.array([0, 3, 4, 11]) if (total, rate) == (12, 10.0) else np.arange(2))
    np.testing.assert_array_equal(clip.frames, expected)
    assert metadata.fps == 10
    np.testing.assert_array_equal(clip.times, np.array([0, 3, 4, 11]) / 10)
    assert len({frame.tobytes() for frame in clip.frames}) == 4


def test_a_variable_rate_is_sampled_in_time_and_not_by_numbers() -> None:
    """Frames at 0, 100, 200, 300 ms and at 1, 2 and 2.1 s: half of the numbers are over after 0.3 s."""
    frames = moving(7)
    clip = read(encoded(frames, stamps=[0, 100, 200, 300, 1000, 2000, 2100]), two_a_second)
    np.testing.assert_allclose(clip.times, np.arange(5) / 2, atol=1e-6)
    when = np.array([0.0, 0.1, 0.2, 0.3, 1.0, 2.0, 2.1])
    for pixels, time in zip(clip.frames, clip.times, strict=True):
        np.testing.assert_array_equal(pixels, frames[np.flatnonzero(when <= time + 1e-3)[-1]])
    shown = [next(k for k in range(7) if np.array_equal(frames[k], pixels)) for pixels in clip.frames]
    assert shown == [0, 3, 4, 4, 5]
    assert clip.rate == pytest.approx(5 / 2.2, rel=0.1)


def test_the_times_of_a_container_are_rounded_and_do_not_make_a_rate_variable() -> None:
    """Matroska counts milliseconds: 33, 34, 33."""
    clip = read(encoded(moving(40), 30))
    np.testing.assert_allclose(clip.times, np.arange(40) / 30, rtol=1e-3)


def test_a_frame_of_vp8_that_is_never_shown_does_not_count() -> None:
    """The bit after the version says whether a frame is shown (RFC 6386, section 9.1); here of the third."""
    av = pytest.importorskip("av")
    data = encoded(moving(8), kind=("webm", "libvpx", "yuv420p"))
    with av.open(io.BytesIO(data)) as container:
        packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    third = packets[2]
    assert third[0] & 0x10
    assert data.count(third) == 1
    hidden = data.replace(third, bytes([third[0] & ~0x10]) + third[1:])
    whole, cut = read(data), read(hidden, lambda total, rate: np.arange(total))
    assert {frame.tobytes() for frame in cut.frames} == {f.tobytes() for k, f in enumerate(whole.frames) if k != 2}


@pytest.mark.parametrize("cut", [5, 6])
def test_what_a_player_cut_off_is_not_shown(cut: int) -> None:
    """Phones trim a video in its edit list (`elst`: duration in ms, start in ticks of 1/10240 s) and keep the frames
    that the others refer to."""
    data = bytearray(encoded(moving(20), kind=H264))
    entry = data.index(b"elst") + 12
    duration, start = struct.unpack(">Ii", data[entry : entry + 8])
    whole = read(bytes(data))
    data[entry : entry + 8] = struct.pack(">Ii", duration - 100 * cut, start + 1024 * cut)
    clip = read(bytes(data))
    np.testing.assert_array_equal(clip.frames, whole.frames[cut:])
    np.testing.assert_allclose(clip.times, np.arange(20 - cut) / 10)


def test_times_begin_at_the_first_frame() -> None:
    clip = read(encoded(moving(5), stamps=[700, 800, 900, 1000, 1100]))
    np.testing.assert_allclose(clip.times, np.arange(5) / 10, atol=1e-9)


@pytest.mark.parametrize(("rotation", "turns"), [(90, 1), (-90, 3), (180, 2), (0, 0)])
def test_a_video_is_upright(rotation: int, turns: int) -> None:
    """The rotation of a file is counter-clockwise, as `np.rot90` turns."""
    plain = read(encoded(moving(3, 32, 48), kind=H264)).frames
    turned = read(encoded(moving(3, 32, 48), kind=H264, rotation=rotation)).frames
    np.testing.assert_array_equal(turned, np.rot90(plain, turns, axes=(1, 2)))
    assert turned.flags.c_contiguous


def test_only_frames_up_to_the_last_chosen_one_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    pixels = video_files._pixels

    def marked(frame: Any, number: int) -> NDArray[np.uint8]:
        made.append(number)
        return pixels(frame, number)

    monkeypatch.setattr(video_files, "_pixels", marked)
    data = encoded(moving(30))
    for at in range(len(data) * 2 // 3, len(data) - 200, 50):  # the last third is noise
        data = data[:at] + b"\xff" + data[at + 1 :]
    assert len(read(data, lambda total, rate: np.array([1, 8])).frames) == 2
    assert made == [1, 8]


def test_a_large_file_is_not_read_into_memory(tmp_path: Path) -> None:
    """An MP4 with 100 MB of padding behind it."""
    path, padding = tmp_path / "large.mp4", 100_000_000
    data = encoded(moving(6), kind=H264)
    path.write_bytes(data + padding.to_bytes(4, "big") + b"free")
    os.truncate(path, len(data) + padding)
    tracemalloc.start()
    try:
        with open_video(path) as file:
            digest = video_files.content_hash(file)
        clip = read(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 10_000_000
    np.testing.assert_array_equal(clip.frames, read(data).frames)
    assert digest == hashlib.sha256(path.read_bytes()).digest()


# ── faults ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_video_of_one_frame_is_refused() -> None:
    with pytest.raises(
        VideoError, match=r"an encoded video of \d+ bytes: it has one frame, which shows no time: show it"
    ):
        read(encoded(moving(1)))
    with pytest.raises(VideoError, match="one frame of the video would be shown"):
        read(encoded(moving(5)), lambda total, rate: np.array([0]))


def test_more_frames_than_the_budget_are_refused() -> None:
    with pytest.raises(VideoError, match=r"shows 5 frames, more than model\.vlm\.video\.max_frames=4"):
        read(encoded(moving(5)), max_frames=4)
    for video in (Video(moving(5)), Video(moving(5), times=range(5))):
        with pytest.raises(VideoError, match=r"shows 5 frames, more than model\.vlm\.video\.max_frames=4"):
            decode_frames(video, ALL, 1.0, 4)
    assert len(decode_frames(Video(moving(5), fps=1.0), every(2), 1.0, 4).frames) == 3


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("a\0.mp4", "cannot be read: embedded null byte"),
        ("nowhere.mp4", "cannot be read: No such file or directory"),
        ("/dev/zero", "it is a device, not a file"),
        ("/", "it is a folder, not a file"),
        ("https://example.com/a.mp4", "No such file or directory"),
        ("concat:a.mp4|b.mp4", "No such file or directory"),
    ],
)
def test_a_path_that_is_no_file(name: str, reason: str) -> None:
    with pytest.raises(VideoError, match=f"^the video file .*{reason}"):
        read(name)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(VideoError, match=r"pipe\.mp4 cannot be read: it is a pipe"):
        read(tmp_path / "pipe.mp4")


def test_a_huge_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with open(tmp_path / "huge.mp4", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(VideoError, match=f"{1 << 40} bytes is larger than {MAX_FILE_BYTES} bytes"):
        read(tmp_path / "huge.mp4")


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"<html>404</html>",
        b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n",
        b"ffconcat version 1.0\nfile '/etc/hostname'\n",
        b"RIFF\0\0\0\0WAVEfmt ",
    ],
)
def test_what_is_no_video_and_what_names_another_file(text: bytes) -> None:
    pytest.importorskip("av")
    with pytest.raises(VideoError, match=r"it is in no format that is read here|it has no video stream"):
        read(text)


def test_a_sound_without_pictures() -> None:
    av = pytest.importorskip("av")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as output:
        stream = output.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        output.mux(stream.encode(frame))
    with pytest.raises(VideoError, match="it has no video stream"):
        read(buffer.getvalue())


def test_a_file_that_is_cut_off() -> None:
    whole = encoded(moving(20), kind=("mp4", "libx264", "yuv420p"), options={"x264-params": "threads=1"})
    at_the_front = encoded(moving(20), kind=("avi", "mpeg4", "yuv420p"))
    for data in (whole, at_the_front):
        with pytest.raises(VideoError, match=r"an encoded video of \d+ bytes"):
            read(data[: len(data) // 2])


def test_a_header_that_claims_a_huge_frame() -> None:
    """A GIF states the size of its frames in four bytes; nothing of that size is allocated."""
    data = bytearray(encoded(moving(3), kind=("gif", "gif", "rgb8")))
    data[6:10] = (60_000).to_bytes(2, "little") * 2
    with pytest.raises(VideoError, match="its frames have no size, or more than 67108864 pixels"):
        read(bytes(data))


def test_too_many_frames_and_too_long_a_video(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(VideoError, match=r"its last frame is shown after 1e\+05 s, which is not in \(0, 86400\]"):
        read(encoded(moving(2), stamps=[0, 100_000_000]))
    monkeypatch.setattr(video_files, "MAX_FILE_FRAMES", 9)
    with pytest.raises(VideoError, match="it has more than 9 frames: cut it"):
        read(encoded(moving(10)))
    monkeypatch.setattr(video_files, "MAX_CLIP_PIXELS", 4 * 48 * 64)
    with pytest.raises(VideoError, match=r"5 frames of 64 × 48 are more than 12288 pixels in all"):
        read(encoded(moving(5)))


def test_what_a_file_says_itself_is_not_said_again() -> None:
    with pytest.raises(VideoError, match="a video file says itself when its frames are shown"):
        read(encoded(moving(5)), fps=3.0)


def test_no_mutated_video_escapes_the_fence() -> None:
    rng, texts = random.Random(0), set()
    kinds = [LOSSLESS, H264, ("webm", "libvpx-vp9", "yuv420p"), ("avi", "mpeg4", "yuv420p"), ("gif", "gif", "rgb8")]
    files = [encoded(moving(6, 32, 32), kind=kind) for kind in kinds]
    outcomes = {True: 0, False: 0}
    for number in range(300):
        try:
            clip = read(mutated(files[number % len(files)], rng))
        except VideoError as error:
            texts.add(error.text)
            outcomes[False] += 1
        else:
            assert clip.frames.ndim == 4
            assert (np.diff(clip.times) >= 0).all()
            outcomes[True] += 1
    assert min(outcomes.values()) > 30
    assert not [text for text in texts if " at 0x" in text or " @ 0x" in text]


def test_without_pyav_the_pip_line_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_files, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install 'vlmrl\[video\]'"):
        check_installed()


# ── frames ──────────────────────────────────────────────────────────────────────────────────────────────────


class Billions(list[NDArray[np.uint8]]):
    """A sequence that claims to be long."""

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, index: Any) -> Any:
        raise AssertionError("a frame was read")

    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("a frame was read")


@pytest.mark.parametrize(
    ("video", "reason"),
    [
        (Video(np.zeros((5, 8, 8), np.uint8)), r"must be uint8 \[T, H, W, 3\], not uint8 \[5, 8, 8\]"),
        (Video(np.zeros((5, 8, 8, 3), np.float32)), r"must be uint8 \[T, H, W, 3\], not float32"),
        (Video([]), "a video has no frame"),
        (Video(np.zeros((0, 8, 8, 3), np.uint8)), "a video has no frame"),
        (Video(np.zeros((1, 8, 8, 3), np.uint8)), "a video of one frame shows no time"),
        (Video(np.zeros((3, 0, 8, 3), np.uint8)), "8 × 0 pixels is empty"),
        (Video([PILImage.new("RGB", (8, 8)), PILImage.new("RGB", (8, 9))]), "several sizes, 8 × 8 and 8 × 9"),
        (Video(moving(3), times=[0, 2, 1]), "are not 3 ascending numbers of seconds"),
        (Video(moving(3), times=[0, 1]), "are not 3 ascending numbers of seconds"),
        (Video(moving(3), times=[0, 1, float("nan")]), "are not 3 ascending numbers of seconds"),
        (Video(moving(3), times=[1, 1, 1]), "shown at the same time"),
        (Video(moving(3), fps=0.0), "fps=0.0 has no duration"),
        (Video(Billions()), "shows 1000000000 frames, more than"),
        (Video(7), "not int"),
    ],
)
def test_frames_that_are_refused(video: Video, reason: str) -> None:
    with pytest.raises(VideoError, match=reason), image_errors(video.source, VideoError):
        decode_frames(video, ALL, 1.0, 100)
