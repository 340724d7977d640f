"""Bytes of a file by position, safe for threads; a compressed file is unpacked first."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from pathlib import Path

from vlmrl.errors import ConfigError
from vlmrl.tasks.dataset.sources.reader import PACKED

_WIDE = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
BOM = b"\xef\xbb\xbf"
"""Windows programs begin a file of UTF-8 with these bytes. They are no text."""


class RawFile:
    """A file of bytes, open for as long as the object lives, so that removing the file does not end a run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = _unpacked(path) if path.suffix.lower() in PACKED else os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._fd)
        self.size = os.fstat(self._fd).st_size

    def read(self, start: int, end: int) -> bytes:
        """Bytes `start` to `end`, fewer at the end of the file. `pread` has no position that threads could share."""
        data = os.pread(self._fd, end - start, start) if start < end else b""
        while data and start + len(data) < end:  # one call gives at most 2 GiB
            more = os.pread(self._fd, end - start - len(data), start + len(data))
            if not more:
                break
            data += more
        return data

    def fileno(self) -> int:
        return self._fd


class TextFile(RawFile):
    """A file of UTF-8. `start` is where its text begins: after the byte order mark, if it has one."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        head = self.read(0, 4)
        if head[:2] in _WIDE:
            raise ConfigError(
                f"task.path={path} is written in UTF-16, so no row of it can be read: convert it, for example by "
                f"iconv -f UTF-16 -t UTF-8"
            )
        self.start = len(BOM) if head.startswith(BOM) else 0


def _unpacked(path: Path) -> int:
    """A descriptor of a temporary file without a name, which has the content of a compressed one."""
    import pyarrow

    codec = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}[path.suffix.lower()]
    with tempfile.TemporaryFile() as unpacked, open(path, "rb") as packed:
        try:
            with pyarrow.CompressedInputStream(packed, codec) as content:
                shutil.copyfileobj(content, unpacked, 1 << 20)
            unpacked.flush()
        except OSError as error:
            raise ConfigError(
                f"task.path={path} cannot be unpacked ({error}), so there are no rows: copy the file again, or make "
                f"room in {tempfile.gettempdir()}, where it is unpacked (environment variable TMPDIR)"
            ) from None
        return os.dup(unpacked.fileno())
