"""Write a file whole or not at all, and name the file when the disk fails."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from vlmrl.errors import VlmrlError


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


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let `write` fill a file that appears at `path` complete or not at all. Raises OSError.

    The temporary name is fixed (`.<name>.tmp`): only one process writes to a run directory, and it overwrites what a
    killed process left behind.
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
