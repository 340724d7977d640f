"""Pixels of an `Image` part, whatever it is handed in as, and whatever is wrong with it.

    path ──read──▶ bytes ──decode──┐
    PIL image ─────────────────────┼─▶ RGB ──turn upright──▶ uint8 [H, W, 3]        every fault: ImageError
    uint8 [H, W, 3] ───────────────┘

Decoding follows the model's own tool chain: Pillow's `convert("RGB")`, which drops an alpha channel. Photos are turned
upright by their EXIF tag, as image viewers and transformers' `load_image` do, whichever way they are handed in. Samples
of 16 bits are scaled to 8 bits; Pillow would clip almost all of them to white.

Decoders run inside one fence: whatever they raise becomes an `ImageError` that names the file and holds no address in
memory, so that equal faults have equal texts. A file is checked before it is opened, and is never waited for: a pipe or
a device is refused.

Left out on purpose: URLs (a run must not depend on a web server), animations (the first frame is used), and the formats
of `NOT_READ`.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import stat
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, TypeAlias
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, ImageFile, UnidentifiedImageError
from PIL import Image as PILImage

from vlmrl.errors import UserFault, fenced, safe_text

Pixels: TypeAlias = NDArray[np.uint8]
"""uint8 [H, W, 3], RGB, 0 to 255."""

MAX_PIXELS = 1 << 26
"""Images with a larger H × W are refused before decoding (67 million; a PNG of a few KB can claim billions)."""

MAX_FILE_BYTES = 8 * MAX_PIXELS
"""Larger files and bytes are refused before they are read: the largest image in four channels of 16 bits, 512 MiB."""

NOT_READ = frozenset({"EPS", "IPTC", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"})
"""Pillow's formats that are not read: EPS starts Ghostscript, IPTC opens what it holds as any format (EPS, too), and
Pillow has no decoder for the others on Linux."""

_TRANSPOSED = {
    2: PILImage.Transpose.FLIP_LEFT_RIGHT,
    3: PILImage.Transpose.ROTATE_180,
    4: PILImage.Transpose.FLIP_TOP_BOTTOM,
    5: PILImage.Transpose.TRANSPOSE,
    6: PILImage.Transpose.ROTATE_270,
    7: PILImage.Transpose.TRANSVERSE,
    8: PILImage.Transpose.ROTATE_90,
}
"""EXIF orientation → how Pillow turns the image upright."""

_ADDRESS = re.compile(r" (?:at|@) 0x[0-9a-fA-F]+")
"""What Python writes of an object without a text of its own, and FFmpeg of a decoder; it differs from run to run."""

_NOT_FILES = ((stat.S_ISDIR, "folder"), (stat.S_ISFIFO, "pipe"), (stat.S_ISSOCK, "socket"))


class ImageError(UserFault):
    """An image that cannot be decoded or processed. Ends its rollout as `image_error`; not an error of the run."""

    noun: ClassVar[str] = "image"
    """What messages call the thing that is read."""


class VideoError(ImageError):
    """A video that cannot be decoded or processed. Ends its rollout as `image_error`; not an error of the run."""

    noun = "video"


def decode(source: Any) -> Pixels:
    """The pixels of an `Image.source`: a PIL image, uint8 [H, W, 3], encoded bytes, or a path. Raises `ImageError`.

    Threads that decode the same PIL image do so one after the other, because Pillow loads it when it is first used and
    is not thread-safe there.

    >>> decode(PILImage.new("L", (3, 2), 7)).shape
    (2, 3, 3)
    >>> decode(np.zeros((4, 4), np.uint8))
    Traceback (most recent call last):
    vlmrl.rendering.images.ImageError: an image array must be uint8 [H, W, 3], not uint8 [4, 4]
    """
    with image_errors(source):
        if isinstance(source, np.ndarray):
            return _decode_array(source)
        if isinstance(source, PILImage.Image):
            with lock_of(id(source)):
                return _decode_pil(source)
        if isinstance(source, bytes):
            _check_bytes(len(source))
            return _decode_encoded(source)
        if isinstance(source, str | Path):
            return decode(read_file(source))
        raise ImageError(f"an image must be a PIL image, a uint8 array, bytes or a path, not {type(source).__name__}")


def read_file(path: str | Path) -> bytes:
    """The content of a regular file of at most `MAX_FILE_BYTES`. Raises `ImageError`."""
    with image_errors(path):
        return _read(path)


def image_hash(pixels: Pixels) -> str:
    """32 hex characters: SHA-256 of the RGB bytes and of "(width, height)". The `renderers` package uses the same hash.

    >>> image_hash(np.zeros((32, 32, 3), np.uint8))
    '4d7fc975f0b1832b9a3356b0492f265a'
    """
    digest = hashlib.sha256(pixels.tobytes())
    digest.update(str((pixels.shape[1], pixels.shape[0])).encode())
    return digest.hexdigest()[:32]


# ── faults ──────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def image_errors(source: Any, fault: type[ImageError] = ImageError) -> Iterator[None]:
    """Whatever the block raises about `source` becomes a `fault` that names it."""
    name = _name(source, fault.noun)
    try:
        with fenced(f"{name or f'the {fault.noun}'} cannot be decoded: the decoder", fault):
            yield
    except ImageError as error:
        text = _ADDRESS.sub("", error.text)
        if name is not None and name not in text:
            text = f"{name}: {text}"
        raise fault(text, error.traceback) from None


def _name(source: Any, noun: str) -> str | None:
    """The name of an image or video in messages; None for one without a file or a size."""
    try:
        with fenced("the name of an image", ImageError):
            if isinstance(source, bytes):
                return f"an encoded {noun} of {len(source)} bytes"
            if isinstance(source, str | Path):
                return f"the {noun} file {safe_text(source)}"
            if isinstance(source, ImageFile.ImageFile) and source.filename:
                filename = source.filename
                return f"the {noun} file {safe_text(os.fsdecode(filename) if filename else filename)}"
    except ImageError:
        pass
    return None


class _Lock:
    """A lock that a weak dictionary can hold."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *exc: object) -> None:
        self._lock.release()


_LOCKS: WeakValueDictionary[object, _Lock] = WeakValueDictionary()
"""What is being decoded → its lock, while a thread holds or awaits it."""

_LOCKS_LOCK = threading.Lock()


def lock_of(key: object) -> _Lock:
    """The lock of a source that several threads may decode at the same time."""
    with _LOCKS_LOCK:
        lock = _LOCKS.get(key)
        if lock is None:
            lock = _LOCKS[key] = _Lock()
        return lock


# ── files ───────────────────────────────────────────────────────────────────────────────────────────────────


def _read(path: str | Path) -> bytes:
    """The content of a regular file of at most `MAX_FILE_BYTES`."""
    with open_file(path, _check_bytes) as file:
        return file.read(MAX_FILE_BYTES + 1)


@contextmanager
def open_file(
    path: str | Path, check_bytes: Callable[[int], None], fault: type[ImageError] = ImageError
) -> Iterator[BinaryIO]:
    """A regular file, open for reading. `check_bytes` is called with its size before it is opened, and may refuse it.
    Raises `fault`, also where the block cannot read the file."""
    name = f"the {fault.noun} file {safe_text(path)}"
    try:
        expanded = os.path.expanduser(path)
        _check_file(name, os.stat(expanded), check_bytes, fault)  # before: to open a device may already do something
        # Without waiting: between the two lines the file may have become a pipe that nobody writes to.
        with open(os.open(expanded, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY), "rb") as file:
            _check_file(name, os.fstat(file.fileno()), check_bytes, fault)
            yield file
    except OSError as error:
        # Not str(error), which quotes the path as it is: it may hold what cannot be written to a file.
        reason = os.strerror(error.errno) if error.errno is not None else type(error).__name__
        raise fault(f"{name} cannot be read: {reason}") from error
    except ValueError as error:  # a NUL or a lone surrogate in the path
        raise fault(f"{name} cannot be read: {safe_text(error)}") from error


def _check_file(name: str, status: os.stat_result, check_bytes: Callable[[int], None], fault: type[ImageError]) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = next((kind for holds, kind in _NOT_FILES if holds(status.st_mode)), "device")
        raise fault(f"{name} cannot be read: it is a {kind}, not a file")
    check_bytes(status.st_size)


def _check_bytes(num_bytes: int) -> None:
    if num_bytes > MAX_FILE_BYTES:
        raise ImageError(
            f"an encoded image of {num_bytes} bytes is larger than {MAX_FILE_BYTES} bytes, the most that an image of "
            f"{MAX_PIXELS} pixels needs: shrink it"
        )


# ── decoding ────────────────────────────────────────────────────────────────────────────────────────────────


def _decode_array(array: NDArray[Any]) -> Pixels:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ImageError(f"an image array must be uint8 [H, W, 3], not {array.dtype} {list(array.shape)}")
    _check_size(array.shape[1], array.shape[0])
    return _checked(np.array(array, np.uint8, copy=True, subok=False))


def _decode_encoded(encoded: bytes) -> Pixels:
    _quiet_pillow()
    PILImage.init()
    formats = [name for name in PILImage.ID if name not in NOT_READ]
    try:
        image = PILImage.open(io.BytesIO(encoded), formats=formats)
    except UnidentifiedImageError:
        raise ImageError(
            f"an encoded image of {len(encoded)} bytes cannot be decoded: it is in no format that is read here, such "
            "as PNG, JPEG, WebP, TIFF, BMP or GIF"
        ) from None
    with image:
        return _decode_pil(image)


def _decode_pil(image: PILImage.Image) -> Pixels:
    _quiet_pillow()
    _check_size(image.width, image.height)
    if isinstance(image, ImageFile.ImageFile) and image.tile:  # it was opened and not loaded yet
        if image.format in NOT_READ:
            raise ImageError(f"images of format {image.format} are not read: convert it to PNG")
        if image.fp is None:
            raise ImageError(
                "its file was closed before its pixels were read, so it cannot be decoded: call load() on the PIL "
                "image inside the `with` block, or pass the path"
            )
    image.load()
    _check_size(image.width, image.height)  # an icon file may hold another size than its header states
    rgb, orientation = _to_rgb(image), _orientation(image)
    return _checked(np.array(rgb if orientation is None else rgb.transpose(orientation)))


def _orientation(image: PILImage.Image) -> PILImage.Transpose | None:
    """How the image is turned upright. Damaged EXIF data say nothing, as for image viewers."""
    try:
        with fenced("reading EXIF data", ImageError):
            return _TRANSPOSED.get(int(image.getexif().get(ExifTags.Base.Orientation, 1)))
    except ImageError:
        return None


def _to_rgb(image: PILImage.Image) -> PILImage.Image:
    if image.mode == "RGB":
        return image
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours; going straight to RGB warns
    if image.mode in ("I", "I;16", "I;16L", "I;16B", "I;16N"):
        image = _eight_bits(image)
    if image.mode == "F":
        raise ImageError("an image of mode F has no defined range: convert it to 8 bits per sample")
    return image.convert("RGB")


def _eight_bits(image: PILImage.Image) -> PILImage.Image:
    """Samples of 16 bits, scaled. Mode I (32 bits) is what Pillow makes of gray files of 16 bits, and of any gray image
    that is converted to it, so its samples are taken for 16 bits only where they cannot be 8 bits."""
    samples = np.asarray(image)
    low, high = int(samples.min()), int(samples.max())
    if low < 0 or high > 65535:
        raise ImageError(f"an image of mode {image.mode} has samples outside 16 bits: convert it to 8 bits per sample")
    if image.mode == "I" and 0 < high < 256 and image.format not in ("PNG", "PPM"):  # those files state 16 bits
        raise ImageError(
            f"an image of mode I has no sample above {high}, so it may be of 8 bits or a dark one of 16 bits: convert "
            'it to mode "L" (8 bits) or "I;16" (16 bits)'
        )
    return PILImage.fromarray(((samples.astype(np.uint32) + 128) // 257).astype(np.uint8))


def _check_size(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise ImageError(f"an image of {width} × {height} pixels is empty")
    if width * height > MAX_PIXELS:
        raise ImageError(f"an image of {width} × {height} pixels is larger than {MAX_PIXELS} pixels: shrink it")


def _checked(pixels: NDArray[Any]) -> Pixels:
    """Pixels that a decoder made; an image that changes its size while it is loaded is refused."""
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ImageError(f"an image was decoded to {pixels.dtype} {list(pixels.shape)}, not to uint8 [H, W, 3]")
    _check_size(pixels.shape[1], pixels.shape[0])
    return pixels


def _quiet_pillow() -> None:
    """Ignore the warnings that Pillow's own modules raise about an image's data. `warnings.catch_warnings` cannot be
    used: it is not thread-safe, and images are decoded in several threads."""
    if not (warnings.filters and warnings.filters[0] == _IGNORED):
        warnings.filterwarnings("ignore", module=_PILLOW)


_PILLOW = r"PIL\."
_IGNORED = ("ignore", None, Warning, re.compile(_PILLOW), 0)
