"""Images that are broken on purpose: each one is decoded or refused by an `ImageError`, and nothing else happens."""

from __future__ import annotations

import io
import itertools
import os
import random
import socket
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, ImageFile
from PIL import Image as PILImage

from support.mutations import mutated
from vlmrl.rendering.images import MAX_FILE_BYTES, MAX_PIXELS, ImageError, decode
from vlmrl.rendering.processors import ProcessImage

PILImage.init()
MODES = ("RGB", "L", "P", "RGBA", "1")


def picture(width: int = 16, height: int = 16) -> PILImage.Image:
    return PILImage.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def whole_images() -> dict[tuple[str, str], bytes]:
    """(format, mode) → an image in each format that Pillow can write."""
    found = {}
    for format in sorted(PILImage.SAVE):
        for mode in MODES:
            buffer = io.BytesIO()
            try:
                with warnings.catch_warnings(action="ignore"):  # Pillow will drop some formats
                    picture().convert(mode).save(buffer, format)
            except (OSError, KeyError, ValueError):
                continue  # this format does not hold this mode
            found[format, mode] = buffer.getvalue()
    return found


def fuzz(mutations: int, seed: int) -> None:
    rng, images = random.Random(seed), whole_images()
    assert {format for format, _ in images} > {"PNG", "JPEG", "WEBP", "AVIF", "TIFF", "BLP", "DDS", "GIF"}
    texts = set()
    for key in itertools.islice(itertools.cycle(sorted(images)), mutations):
        data = mutated(images[key], rng)
        try:
            pixels = decode(data)
        except ImageError as error:
            texts.add(error.text)
        else:
            assert pixels.ndim == 3
            assert pixels.shape[2] == 3
    assert not [text for text in texts if " at 0x" in text]


def test_no_mutated_image_escapes_the_fence() -> None:
    fuzz(2000, seed=0)


@pytest.mark.release
@pytest.mark.parametrize("seed", range(1, 5))
def test_no_mutated_image_escapes_the_fence_long(seed: int) -> None:
    fuzz(15_000, seed)


# ── files ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("a\0.png", "cannot be read: embedded null byte"),
        ("~$x.png", "cannot be read: No such file or directory"),
        ("~nobody-of-that-name/x.png", "cannot be read: No such file or directory"),
        ("a\ud83d.png", r"a\\ud83d\.png cannot be read"),
        ("x" * 5000, "cannot be read: File name too long"),
        (" ", "cannot be read: No such file or directory"),
        ("/dev/zero", "it is a device, not a file"),
        ("/dev/tty", "it is a device, not a file"),
        ("/", "it is a folder, not a file"),
        ("https://example.com/x.png", "No such file or directory"),
    ],
)
@pytest.mark.parametrize("kind", [str, Path])
def test_a_path_that_is_no_file(name: str, reason: str, kind: type) -> None:
    with pytest.raises(ImageError, match=reason) as raised:
        decode(kind(name))
    raised.value.text.encode()


def test_a_file_whose_name_begins_with_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    picture().save("~$x.png")
    np.testing.assert_array_equal(decode("~$x.png"), np.array(picture()))


def test_nothing_is_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageError, match=r"pipe\.png cannot be read: it is a pipe"):
        decode(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "pipe.png")
    with pytest.raises(ImageError, match="it is a pipe"):
        decode(tmp_path / "link.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s.png"))
        with pytest.raises(ImageError, match="it is a socket"):
            decode(tmp_path / "s.png")


def test_a_huge_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with open(tmp_path / "huge.png", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(
        ImageError, match=f"^the image file .*huge.png: .*{1 << 40} bytes is larger than {MAX_FILE_BYTES} bytes"
    ):
        decode(tmp_path / "huge.png")


def test_postscript_is_not_handed_to_ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A `gs` that leaves a mark when it is called."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/called\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    picture().save(tmp_path / "a.eps")
    with pytest.raises(ImageError, match="in no format that is read here"):
        decode(tmp_path / "a.eps")
    with PILImage.open(tmp_path / "a.eps") as lazy, pytest.raises(ImageError, match="format EPS are not read"):
        decode(lazy)
    assert not (tmp_path / "called").exists()


# ── errors name the file, however the image is handed in ────────────────────────────────────────────────────


def test_a_damaged_file_is_named_in_every_way(tmp_path: Path) -> None:
    path = tmp_path / "damaged.png"
    buffer = io.BytesIO()
    picture(64, 64).save(buffer, "PNG")
    path.write_bytes(buffer.getvalue()[:300])
    with PILImage.open(path) as lazy:
        for source in (path, str(path), lazy):
            with pytest.raises(ImageError, match=r"^the image file .*damaged\.png"):
                decode(source)


def test_equal_faults_have_equal_texts(tmp_path: Path) -> None:
    texts = set()
    for _ in range(3):
        with pytest.raises(ImageError) as raised:
            decode(b"<html>404</html>")
        texts.add(str(raised.value))
    assert texts == {
        "an encoded image of 16 bytes cannot be decoded: it is in no format that is read here, such as PNG, JPEG, "
        "WebP, TIFF, BMP or GIF"
    }

    class Evil(PILImage.Image):
        def load(self) -> Any:
            raise RuntimeError(f"what is {self!r}")

    with pytest.raises(ImageError) as raised:
        decode(_as(Evil, picture()))
    assert " at 0x" not in str(raised.value)


def _as(kind: type, image: PILImage.Image) -> Any:
    changed = kind()
    changed.__dict__.update(image.__dict__)
    return changed


def test_a_pil_image_whose_file_was_closed_before_it_was_loaded(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    with PILImage.open(tmp_path / "a.png") as closed:
        pass
    with pytest.raises(ImageError, match=r"a\.png: its file was closed before its pixels were read.*call load\(\)"):
        decode(closed)
    with PILImage.open(tmp_path / "a.png") as loaded:
        loaded.load()
    np.testing.assert_array_equal(decode(loaded), np.array(picture()))
    image = picture()
    image.close()
    with pytest.raises(ImageError):
        decode(image)


def test_code_of_a_subclass_may_raise_anything() -> None:
    class Array(np.ndarray):
        def copy(self, order: Any = "C") -> Any:
            raise RuntimeError("copy")

        @property
        def dtype(self) -> Any:
            raise SystemExit(3)

    class Closed(PILImage.Image):
        @property
        def width(self) -> int:
            raise KeyError("width")

    for source in (np.zeros((4, 4, 3), np.uint8).view(Array), _as(Closed, picture())):
        with pytest.raises(ImageError):
            decode(source)


def test_an_image_processor_may_raise_anything() -> None:
    def processor(**arguments: Any) -> Any:
        raise KeyError("size")

    with pytest.raises(ImageError, match=r"an image of 5 × 4 cannot be processed: .*KeyError: 'size'"):
        ProcessImage(processor, lambda kwargs, _: 1)(np.zeros((4, 5, 3), np.uint8))


# ── orientation and depth ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", [1, 6, 7])
def test_a_photo_is_upright_however_it_is_handed_in(format: str, orientation: int, tmp_path: Path) -> None:
    exif, path = PILImage.Exif(), tmp_path / f"a.{format.lower()}"
    exif[ExifTags.Base.Orientation] = orientation
    picture(8, 4).save(path, format, exif=exif)
    expected = decode(path)
    assert expected.shape == ((4, 8, 3) if orientation == 1 else (8, 4, 3))
    with PILImage.open(path) as lazy, PILImage.open(path) as loaded, PILImage.open(path) as copied:
        loaded.load()
        for source in (str(path), path.read_bytes(), lazy, lazy, loaded, copied.copy(), copied.convert("RGB")):
            np.testing.assert_array_equal(decode(source), expected)
        lazy.load()
        np.testing.assert_array_equal(decode(lazy), expected)


def test_damaged_exif_data_do_not_cost_the_image() -> None:
    image = picture()
    image.info["exif"] = b"Exif\0\0no header"
    np.testing.assert_array_equal(decode(image), np.array(picture()))


def test_eight_bits_in_mode_i_are_refused_and_not_nearly_black() -> None:
    eight = picture().convert("L").convert("I")
    with pytest.raises(ImageError, match=r'may be of 8 bits or a dark one of 16 bits: convert it to mode "L"'):
        decode(eight)
    assert not decode(PILImage.new("I", (4, 4), 0)).any()  # black is black
    sixteen = PILImage.fromarray(np.full((4, 4), 32896, np.int32))
    assert set(decode(sixteen).ravel().tolist()) == {128}


def test_a_dark_file_of_16_bits_is_dark() -> None:
    assert set(decode(b"P5 2 2 65535\n" + b"\0\xff" * 4).ravel().tolist()) == {1}


def test_no_warning_escapes_although_warnings_are_errors() -> None:
    """Pillow warns about transparency in bytes, about large images and about damaged metadata."""
    palette = picture().quantize(16)
    buffer = io.BytesIO()
    palette.save(buffer, "PNG", transparency=bytes(range(16)))
    assert decode(buffer.getvalue()).shape == (16, 16, 3)
    with PILImage.open(io.BytesIO(buffer.getvalue())) as lazy:
        assert decode(lazy).shape == (16, 16, 3)


def test_an_icon_that_holds_a_larger_image_than_it_states() -> None:
    inner = io.BytesIO()
    side = int(MAX_PIXELS**0.5) + 8
    PILImage.new("1", (side, side)).save(inner, "PNG")
    data = inner.getvalue()
    header = b"\0\0\1\0\1\0" + bytes([16, 16, 0, 0, 1, 0, 32, 0]) + len(data).to_bytes(4, "little") + b"\x16\0\0\0"
    with pytest.raises(ImageError, match=r"larger than|cannot be decoded"):
        decode(header + data)


def test_threads_that_decode_one_pil_image_do_not_disturb_each_other(tmp_path: Path) -> None:
    picture(120, 90).save(tmp_path / "a.png")
    expected, wrong = np.array(picture(120, 90)), []
    for _ in range(40):
        start = threading.Barrier(4)
        with PILImage.open(tmp_path / "a.png") as shared:

            def work(shared: ImageFile.ImageFile = shared, start: threading.Barrier = start) -> None:
                start.wait()
                try:
                    if not np.array_equal(decode(shared), expected):
                        wrong.append("other pixels")
                except ImageError as error:
                    wrong.append(error.text)

            threads = [threading.Thread(target=work) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    assert not wrong
