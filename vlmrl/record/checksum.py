"""A checksum of a whole Parquet file, inside the file.

    PAR1, pages, "crc32=" and 8 hex digits, footer, length of the footer, PAR1

Parquet has checksums of its pages only. A wrong byte elsewhere, in the footer or the header of a page, makes pyarrow
end the process (segmentation fault, pyarrow 26). The checksum finds what a disk or an editor damages; it is no
protection against somebody who wants to do harm. Readers find pages by their offsets, so they skip these 14 bytes. A
file of another program has none.
"""

from __future__ import annotations

import os
import zlib
from typing import BinaryIO

MARK = b"crc32="
LENGTH = len(MARK) + 8
END_BYTES = 8
"""The length of the footer and `PAR1`."""
CHUNK_BYTES = 2**20


def with_checksum(content: bytes) -> bytes:
    """The Parquet file with its checksum: the CRC-32 of all its other bytes."""
    place = len(content) - END_BYTES - _footer(content[-END_BYTES:])
    return content[:place] + MARK + b"%08x" % zlib.crc32(content) + content[place:]


def is_whole(file: BinaryIO) -> bool:
    """Whether a file is what was written, as far as it has a checksum. Raises OSError."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - END_BYTES, 0))
    place = size - END_BYTES - _footer(file.read()) - LENGTH
    if place < 0:
        return False
    file.seek(place)
    written = file.read(LENGTH)
    if not written.startswith(MARK):
        return True
    file.seek(0)
    checksum = _checksum(file, place, 0)
    file.seek(place + LENGTH)
    return written == MARK + b"%08x" % _checksum(file, size, checksum)


def _footer(end: bytes) -> int:
    """The length of the footer, from the last bytes of a file."""
    return int.from_bytes(end[:4], "little")


def _checksum(file: BinaryIO, end: int, checksum: int) -> int:
    """The CRC-32 up to the position `end`, which continues `checksum`."""
    while chunk := file.read(min(end - file.tell(), CHUNK_BYTES)):
        checksum = zlib.crc32(chunk, checksum)
    return checksum
