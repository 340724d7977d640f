"""Write a file whole or not at all, read only regular files, and name the file when the disk fails."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO

import orjson

from vlmrl.errors import VlmrlError, safe_text

MAX_SMALL_FILE_BYTES = 64 * 2**20
"""Largest config.yaml, summary.json and the like that is read. A run writes a few kilobytes."""


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an OSError (a full disk, a missing folder) into a VlmrlError that names `path`."""
    try:
        yield
    except OSError as error:
        raise VlmrlError(
            f"{path} cannot be written ({error.strerror}), so the run cannot be recorded: "
            "free some space or repair the folder, then continue the run with resume="
        ) from error


@contextmanager
def read_errors() -> Iterator[None]:
    """Turn an OSError about a file of a run that is shown (no permission; a folder, a pipe or a device in its place)
    into a VlmrlError that names the file. Also a decorator: `@read_errors()`."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise
        raise VlmrlError(
            f"{safe_text(error.filename)} cannot be used ({error.strerror}), so the run cannot be shown: put the file "
            "back from a copy, or correct its permissions"
        ) from error


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let `write` fill a file that appears at `path` complete or not at all. Raises OSError.

    The temporary name is fixed (`.<name>.tmp`): only one process writes to a run directory (lock.py), and it overwrites
    what a killed process left behind.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_bytes_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path` by `write_atomically`. Raises OSError."""
    write_atomically(path, lambda file: file.write(data))


def open_regular(path: Path) -> BinaryIO:
    """Open a file to read its bytes. Raises OSError, also for a named pipe or a device, whose reading may never end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def read_small(path: Path) -> bytes:
    """Read a regular file of at most `MAX_SMALL_FILE_BYTES`. Raises OSError."""
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > MAX_SMALL_FILE_BYTES:
            raise OSError(errno.EFBIG, f"it is larger than {MAX_SMALL_FILE_BYTES >> 20} MiB", str(path))
        return file.read()


def read_json(path: Path, is_valid: Callable[[Any], bool], warn: Callable[[str], None]) -> Any:
    """Read a JSON file on which nothing but a display depends. None where it does not exist and, after a warning, where
    it is damaged or `is_valid` refuses its content."""
    try:
        content = orjson.loads(read_small(path))
    except FileNotFoundError:
        return None
    except (OSError, orjson.JSONDecodeError) as error:
        warn(f"{path} is damaged and is ignored: {error}")
        return None
    if not is_valid(content):
        warn(f"{path} is damaged and is ignored: no run wrote this content")
        return None
    return content


def is_number(value: object) -> bool:
    """Whether a value of a JSON file is a number or null, which stands for a number that is not finite."""
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))
