"""The content of a file that a cell names or holds as text: an image or a video.

    text ── data URL, http(s) URL, base64 ──▶ bytes
         └─ the path of a file ─────────────▶ Path, which exists

Whatever is wrong with a text is `Unusable`, with the reason.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import url2pathname

from vlmrl.errors import safe_text
from vlmrl.rendering.images import MAX_FILE_BYTES
from vlmrl.tasks.dataset.columns import Unusable, short
from vlmrl.tasks.dataset.fetch import fetched
from vlmrl.types import Modality

MAGIC: dict[Modality, re.Pattern[bytes]] = {
    "image": re.compile(
        rb"\x89PNG|\xff\xd8\xff|GIF8|BM|II\*\0|MM\0\*|\0\0\0.ftyp|RIFF....(?:WEBP)?|P[1-7][\s#]", re.DOTALL
    ),
    "video": re.compile(rb"\0\0\0.ftyp|\x1aE\xdf\xa3|RIFF....AVI |\x00\x00\x01\xba|FLV\x01|GIF8", re.DOTALL),
}
"""How encoded images and videos begin. Base64 has no header: a text counts as base64 if it decodes to one of these."""

_BASE64 = re.compile(r"[A-Za-z0-9+/_\-\s]{16,}={0,2}\s*")

_DATA_URL = re.compile(r"\s*data:([^,]{0,200}),", re.IGNORECASE)


@dataclass(frozen=True)
class Place:
    """Where a row came from."""

    folder: str | None
    """The folder of its file; None where there is no file."""
    root: str | None = None
    """The folder of its hub data set. No path of such a row may lead out of it, and no URL into this network. None: the
    row is of this machine."""


@dataclass(frozen=True)
class Files:
    """Finds the files that the cells of one data set name. Thread-safe."""

    kind: Modality
    root: Path | None
    """The folder from which paths start; None: at the folder of the row's file."""
    root_key: str
    """The key that sets `root`."""
    fetch: bool
    """Whether http(s) URLs are downloaded."""

    def content(self, text: str, place: Place) -> bytes | Path:
        """What a text names: the bytes that it holds, or the path of a file. Raises `Unusable`."""
        if (header := _DATA_URL.match(text)) is not None:
            return _of_data_url(self.kind, header[1], text[header.end() :])
        if re.match(r"https?://", text, re.IGNORECASE):
            if not self.fetch:
                raise Unusable(
                    f"the {self.kind} {short(text)} is a URL, and task.fetch=false downloads nothing: set "
                    f"task.fetch=true, or download the {self.kind}s"
                )
            return fetched(text.strip(), allow_private=place.root is None, kind=self.kind)
        if text.lower().startswith("file:"):
            text = url2pathname(urlsplit(text).path)
        elif (decoded := _of_base64(self.kind, text)) is not None:
            return decoded
        return self._file(text, place)

    def _file(self, text: str, place: Place) -> Path:
        """The path of a file that exists: below `root`, else next to the row's file, else below the folder of a hub."""
        starts = [self.root] if self.root is not None else [Path(each) for each in (place.folder, place.root) if each]
        if not starts:
            raise Unusable(f"the {self.kind} {short(text)} is a path, and the rows have no folder: set {self.root_key}")
        try:
            paths = [start / (Path(text) if place.root else Path(text).expanduser()) for start in starts]
            found = next((path for path in paths if path.exists()), None)
        except (OSError, ValueError, RuntimeError) as error:  # a NUL, a name that is too long, an unknown ~user
            reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else type(error).__name__
            raise Unusable(f"the {self.kind} {short(text)} is no path that can be read: {reason}") from None
        path = found or paths[0]
        boundary = None if place.root is None else os.path.abspath(self.root or place.root)
        if boundary is not None and not Path(os.path.abspath(path)).is_relative_to(boundary):
            raise Unusable(
                f"the {self.kind} {short(text)} lies outside of {safe_text(boundary)}, which a data set from a hub may "
                f"not read: set {self.root_key} to the folder that holds its {self.kind}s"
            )
        if found is None:
            raise Unusable(
                f"the {self.kind} file {_readable(path)} does not exist: set {self.root_key} to the folder from "
                "which its path starts"
            )
        return path


def _readable(path: Path) -> str:
    """A path as a message shows it: whole, unless it is longer than any that exists."""
    text = safe_text(path)
    return text if text.isprintable() and len(text) <= 400 else f"{short(path.name)} in {safe_text(path.parent)}"


_A: dict[Modality, str] = {"image": "an image", "video": "a video"}


def _of_data_url(kind: Modality, header: str, payload: str) -> bytes:
    """The content of a data URL (RFC 2397)."""
    if len(payload) > MAX_FILE_BYTES:
        raise Unusable(f"{_A[kind]} is a data URL of {len(payload)} characters, too many to decode: shrink it")
    if not header.strip().lower().endswith(";base64"):
        return unquote_to_bytes(payload)
    try:
        return base64.b64decode(_padded(payload), validate=True)
    except (binascii.Error, ValueError) as error:
        raise Unusable(f"{_A[kind]} is a data URL whose base64 is damaged ({error}): write it again") from None


def _of_base64(kind: Modality, text: str) -> bytes | None:
    """The content of a text in base64; None for a text that is no encoded image or video."""
    if len(text) > MAX_FILE_BYTES or _BASE64.fullmatch(text) is None:
        return None
    try:
        if MAGIC[kind].match(base64.b64decode(_padded(text[:64]), validate=True)) is None:
            return None
        return base64.b64decode(_padded(text), validate=True)
    except (binascii.Error, ValueError):
        return None


def _padded(text: str) -> str:
    """Base64 in the standard alphabet, without white space, and filled up to groups of four."""
    text = "".join(text.split()).replace("-", "+").replace("_", "/").rstrip("=")
    return text + "=" * (-len(text) % 4)
