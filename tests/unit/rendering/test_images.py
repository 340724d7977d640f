"""Images: every kind of source gives the same pixels, and broken ones raise ImageError."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PILImage
from renderers.qwen3_vl import _image_hash

from vlmrl.rendering.images import MAX_PIXELS, ImageError, decode, image_hash


def picture(width: int = 7, height: int = 5, seed: int = 0) -> PILImage.Image:
    return PILImage.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def encoded(image: PILImage.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


# ── decoding ────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_source_gives_the_same_pixels(tmp_path: Path) -> None:
    image = picture()
    pixels = np.array(image)
    path = tmp_path / "a.png"
    path.write_bytes(encoded(image))
    for source in (image, pixels, encoded(image), path, str(path)):
        np.testing.assert_array_equal(decode(source), pixels)


def test_the_hash_is_the_renderers_packages() -> None:
    for size in ((7, 5), (5, 7), (32, 32)):
        image = picture(*size)
        assert image_hash(decode(image)) == _image_hash(image)
    assert image_hash(decode(PILImage.new("RGB", (7, 5)))) != image_hash(decode(PILImage.new("RGB", (5, 7))))


def test_a_decoded_array_is_a_copy() -> None:
    source = np.zeros((4, 4, 3), np.uint8)
    pixels = decode(source)
    source[:] = 9
    assert not pixels.any()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"])
def test_other_modes_are_converted_as_pillow_does(mode: str) -> None:
    image = picture().convert("RGB").convert("L" if mode in ("LA", "PA") else "RGB").convert(mode)
    np.testing.assert_array_equal(decode(image), np.array(image.convert("RGB")))


def test_a_palette_with_transparency_keeps_its_colours_and_does_not_warn() -> None:
    image = picture().quantize(16)
    data = encoded(image, transparency=bytes(range(16)))
    np.testing.assert_array_equal(decode(data), np.array(image.convert("RGB")))


def test_alpha_is_dropped_as_the_models_tool_chain_does() -> None:
    image = PILImage.new("RGBA", (2, 2), (10, 20, 30, 0))
    np.testing.assert_array_equal(decode(encoded(image)), np.full((2, 2, 3), (10, 20, 30)))


@pytest.mark.parametrize("mode", ["I;16", "I"])
def test_sixteen_bits_are_scaled_not_clipped(mode: str) -> None:
    samples = np.array([[0, 257, 32896, 65535]], np.uint16 if mode == "I;16" else np.int32)
    image = PILImage.fromarray(samples)
    assert image.mode == mode
    np.testing.assert_array_equal(decode(image)[0, :, 0], [0, 1, 128, 255])
    if mode == "I;16":
        np.testing.assert_array_equal(decode(encoded(image))[0, :, 1], [0, 1, 128, 255])


def test_exif_orientation_is_applied() -> None:
    image = picture(8, 4)
    exif = PILImage.Exif()
    exif[0x0112] = 6  # shown rotated by 270 degrees
    np.testing.assert_array_equal(decode(encoded(image, exif=exif)), np.array(image.rotate(270, expand=True)))


def test_the_first_frame_of_an_animation_is_taken() -> None:
    first, second = PILImage.new("RGB", (4, 4), (255, 0, 0)), PILImage.new("RGB", (4, 4), (0, 255, 0))
    data = encoded(first, "GIF", save_all=True, append_images=[second])
    np.testing.assert_array_equal(decode(data), np.array(first))


def bomb() -> bytes:
    """A PNG of a hundred bytes whose header states 30,000 × 30,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(b"no image", id="bytes that are no image"),
        pytest.param(b"", id="no bytes"),
        pytest.param(encoded(picture(64, 64))[:300], id="truncated PNG"),
        pytest.param(encoded(picture(64, 64), "JPEG")[:300], id="truncated JPEG"),
        pytest.param(encoded(picture(64, 64)).replace(b"IDAT", b"IDAX"), id="PNG with a broken chunk"),
        pytest.param(bomb(), id="decompression bomb"),
        pytest.param("/no/such/file.png", id="a path to nothing"),
        pytest.param(Path(__file__).parent, id="a path to a folder"),
        pytest.param(Path(__file__), id="a path to text"),
        pytest.param(PILImage.new("RGB", (0, 5)), id="zero width"),
        pytest.param(np.zeros((5, 0, 3), np.uint8), id="zero width array"),
        pytest.param(np.zeros((5, 5, 4), np.uint8), id="array with alpha"),
        pytest.param(np.zeros((5, 5, 3), np.float32), id="float array"),
        pytest.param(np.zeros((5, 5), np.uint8), id="flat array"),
        pytest.param(PILImage.new("F", (2, 2)), id="float image"),
        pytest.param(PILImage.fromarray(np.full((2, 2), 70_000, np.int32)), id="more than 16 bits"),
        pytest.param(None, id="None"),
        pytest.param(7, id="a number"),
    ],
)
def test_a_source_that_is_not_an_image_raises_an_image_error(source: Any) -> None:
    with pytest.raises(ImageError):
        decode(source)


@pytest.mark.filterwarnings("ignore")
def test_a_decompression_bomb_is_also_refused_where_warnings_are_not_errors() -> None:
    with pytest.raises(ImageError):
        decode(bomb())


def test_a_decoded_image_that_is_too_large_is_refused() -> None:
    with pytest.raises(ImageError, match="larger than"):
        decode(np.broadcast_to(np.zeros(3, np.uint8), (MAX_PIXELS // 4, 5, 3)))
