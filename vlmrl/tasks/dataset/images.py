"""Pixels from the image cells of a row, whatever form they have.

    cell ──flatten──▶ sources ──┬─ bytes, PIL image, uint8 array ──────────────▶ decode ──▶ uint8 [H, W, 3]
                                ├─ {bytes, path}, {url}, {image}: their content ─▶ as below
                                └─ text: data URL, http(s) URL, base64, or the path of a file

Decoding is that of the renderer (`vlmrl.rendering.images`): bounded, and fenced. Whatever is wrong with a cell is
`Unusable`, with the reason.

Left out on purpose: video and audio, and paths inside archives.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import url2pathname

import numpy as np
from PIL import Image as PILImage

from vlmrl.errors import safe_text
from vlmrl.rendering.images import MAX_FILE_BYTES, ImageError, Pixels, decode
from vlmrl.tasks.dataset.columns import Unusable, as_list, parsed, plain, short
from vlmrl.tasks.dataset.fetch import fetched

_MAGIC = re.compile(rb"\x89PNG|\xff\xd8\xff|GIF8|BM|II\*\0|MM\0\*|\0\0\0.ftyp|RIFF....(?:WEBP)?|P[1-7][\s#]", re.DOTALL)
"""How encoded images begin. Base64 has no header, so a text counts as base64 if it decodes to one of these."""

_BASE64 = re.compile(r"[A-Za-z0-9+/_\-\s]{16,}={0,2}\s*")

_DATA_URL = re.compile(r"\s*data:([^,]{0,200}),", re.IGNORECASE)

CONTENT_KEYS = (
    "bytes",
    "image",
    "image_url",
    "url",
    "data",
    "base64",
    "path",
    "file",
    "file_name",
    "filename",
    "source",
)
"""Where dictionaries have the image: `{bytes, path}` of `datasets`, `{url}` of OpenAI, `{image}` of TRL and Qwen."""


@dataclass(frozen=True)
class Place:
    """Where a row came from."""

    folder: str | None
    """The folder of its file; None where there is no file."""
    root: str | None = None
    """The folder of its hub data set. No path of such a row may lead out of it, and no URL into this network. None: the
    row is of this machine."""


@dataclass(frozen=True)
class ImageReader:
    """Reads the image cells of one data set. Thread-safe."""

    root: Path | None
    """`task.image_root`; None: paths start at the folder of the row's file."""
    fetch: bool
    """Whether http(s) URLs are downloaded."""

    def pixels(self, cell: Any, place: Place) -> list[Pixels]:
        """The images of a cell, one after the other; none for None. Raises `Unusable`."""
        return [self._decoded(source, place) for source in flat(cell)]

    def _decoded(self, source: Any, place: Place) -> Pixels:
        if isinstance(source, str):
            source = self._from_text(source, place)
        try:
            return decode(source)
        except ImageError as error:
            raise Unusable(f"{error.text}: repair or remove the image") from None

    def _from_text(self, text: str, place: Place) -> bytes | Path:
        if (header := _DATA_URL.match(text)) is not None:
            return _of_data_url(header[1], text[header.end() :])
        if re.match(r"https?://", text, re.IGNORECASE):
            if not self.fetch:
                raise Unusable(
                    f"the image {short(text)} is a URL, and task.fetch=false downloads nothing: set task.fetch=true, "
                    "or download the images"
                )
            return fetched(text.strip(), allow_private=place.root is None)
        if text.lower().startswith("file:"):
            text = url2pathname(urlsplit(text).path)
        elif (decoded := _of_base64(text)) is not None:
            return decoded
        return self._file(text, place)

    def _file(self, text: str, place: Place) -> Path:
        """The path of an image file that exists: below `task.image_root`, else next to the row's file, else, of a hub,
        below the folder of the data set."""
        starts = [self.root] if self.root is not None else [Path(each) for each in (place.folder, place.root) if each]
        if not starts:
            raise Unusable(f"the image {short(text)} is a path, and the rows have no folder: set task.image_root")
        try:
            paths = [start / (Path(text) if place.root else Path(text).expanduser()) for start in starts]
            found = next((path for path in paths if path.exists()), None)
        except (OSError, ValueError, RuntimeError) as error:  # a NUL, a name that is too long, an unknown ~user
            reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else type(error).__name__
            raise Unusable(f"the image {short(text)} is no path that can be read: {reason}") from None
        path = found or paths[0]
        boundary = None if place.root is None else os.path.abspath(self.root or place.root)
        if boundary is not None and not Path(os.path.abspath(path)).is_relative_to(boundary):
            raise Unusable(
                f"the image {short(text)} lies outside of {safe_text(boundary)}, which a data set from a hub may not "
                "read: set task.image_root to the folder that holds its images"
            )
        if found is None:
            raise Unusable(
                f"the image file {_readable(path)} does not exist: set task.image_root to the folder from which its "
                "path starts"
            )
        return path


def _readable(path: Path) -> str:
    """A path as a message shows it: whole, unless it is longer than any that exists."""
    text = safe_text(path)
    return text if text.isprintable() and len(text) <= 400 else f"{short(path.name)} in {safe_text(path.parent)}"


def flat(cell: Any) -> Iterator[Any]:
    """The single images of a cell: bytes, PIL images, arrays and texts. Raises `Unusable` for anything else.

    >>> list(flat([{"bytes": b"1", "path": "a.png"}, [None, "b.png"]])), list(flat("['a.png', 'b.png']"))
    ([b'1', 'b.png'], ['a.png', 'b.png'])
    """
    if cell is None:
        return
    if isinstance(cell, PILImage.Image | bytes):
        yield cell
    elif isinstance(cell, bytearray | memoryview):
        yield bytes(cell)
    elif isinstance(cell, np.ndarray) and cell.dtype != object:
        yield cell
    elif isinstance(cell, str):
        if cell.strip():
            yield from _of_text_cell(cell)
    elif isinstance(cell, Mapping):
        found = next((cell[key] for key in CONTENT_KEYS if cell.get(key) is not None), None)
        if found is None and any(value is not None for value in cell.values()):
            raise Unusable(f"an image is a struct of {', '.join(map(str, cell))}, and none of them is known to hold it")
        yield from flat(found)
    elif isinstance(plain(cell), list | tuple):
        for item in plain(cell):
            yield from flat(item)
    else:
        raise Unusable(f"an image is {short(cell)}, a {type(cell).__name__}: it must be a path, bytes, or a data URL")


def _of_text_cell(text: str) -> Iterator[Any]:
    """A text that spells a list (CSV) is that list."""
    if re.fullmatch(r"\s*\[.*\]\s*", text, re.DOTALL):
        listed = as_list(text)
        if listed != [text]:
            yield from flat(listed)
            return
    if re.fullmatch(r"\s*\{.*\}\s*", text, re.DOTALL) and isinstance(found := parsed(text), Mapping):
        yield from flat(found)
        return
    yield text


def _of_data_url(header: str, payload: str) -> bytes:
    """The content of a data URL (RFC 2397)."""
    if len(payload) > MAX_FILE_BYTES:
        raise Unusable(f"an image is a data URL of {len(payload)} characters, too many to decode: shrink it")
    if not header.strip().lower().endswith(";base64"):
        return unquote_to_bytes(payload)
    try:
        return base64.b64decode(_padded(payload), validate=True)
    except (binascii.Error, ValueError) as error:
        raise Unusable(f"an image is a data URL whose base64 is damaged ({error}): write it again") from None


def _of_base64(text: str) -> bytes | None:
    """The content of a text in base64; None for a text that is no encoded image."""
    if len(text) > MAX_FILE_BYTES or _BASE64.fullmatch(text) is None:
        return None
    try:
        if _MAGIC.match(base64.b64decode(_padded(text[:64]), validate=True)) is None:
            return None
        return base64.b64decode(_padded(text), validate=True)
    except (binascii.Error, ValueError):
        return None


def _padded(text: str) -> str:
    """Base64 in the standard alphabet, without white space, and filled up to groups of four."""
    text = "".join(text.split()).replace("-", "+").replace("_", "/").rstrip("=")
    return text + "=" * (-len(text) % 4)
