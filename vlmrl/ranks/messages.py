"""What rank 0 tells another rank: a pickle, and beside it the large arrays (pixels), not copied into it.

    same host     one copy, into memory that the other rank maps too. It is a file without a name (memfd), of which
                  nothing is left when both have let go, whoever was killed
    other hosts   one after another over the connection

Whether two ranks share memory is tried when they meet (`Probe`), not concluded from names: containers of one host may
not see each other's processes.
"""

from __future__ import annotations

import logging
import mmap
import os
import pickle
import secrets
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from vlmrl.errors import RankError

LARGE = 64 * 1024
"""Bytes; smaller arrays go into the pickle."""

ALIGNED = 64
"""Bytes; where an array may begin in shared memory."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Probe:
    """Shared memory that rank 0 offers, for the others to try."""

    path: str | None
    """None: this system has none."""
    content: bytes

    def is_readable(self) -> bool:
        """Whether this process finds there what rank 0 has written."""
        if self.path is None:
            return False
        try:
            about = os.stat(self.path)
            # On another host the path leads anywhere, even to this process's own files: a pipe would never end.
            if not stat.S_ISREG(about.st_mode) or about.st_size != len(self.content):
                return False
            with open(self.path, "r+b") as file:  # as `_mapped` does
                return file.read(len(self.content)) == self.content
        except OSError:
            return False


class Outbox:
    """Rank 0's end of a connection. One message at a time: `answered` comes before the next."""

    def __init__(self, connection: Connection[Any, Any], *, shares_memory: bool) -> None:
        self._connection = connection
        self._shares_memory = shares_memory
        self._file: int | None = None
        """Of the message that is not answered yet."""

    def send(self, message: object) -> None:
        """Returns when all of it is in shared memory or on its way."""
        large: list[memoryview] = []
        payload = pickle.dumps(message, protocol=5, buffer_callback=lambda buffer: _stays(buffer, large))
        sizes = [each.nbytes for each in large]
        path = self._share(large) if self._shares_memory and large else None
        self._connection.send((payload, sizes, path))
        if path is None:
            for each in large:
                self._connection.send_bytes(each)

    def answered(self) -> None:
        """The other rank has received the last message; it maps the memory for as long as it needs it."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _share(self, arrays: Sequence[memoryview]) -> str | None:
        assert self._file is None, "the last message is not answered"
        try:
            self._file, path = _nameless()
            for array, start in zip(arrays, _starts([each.nbytes for each in arrays]), strict=True):
                _write(self._file, array, start)
        except OSError as error:
            log.warning(f"no shared memory for what another rank is to learn, so it goes over the connection: {error}")
            self.answered()
            return None
        return path


def receive(connection: Connection[Any, Any]) -> Any:
    """The next message of an `Outbox`. Its arrays are this process's own, and read-only where they were before.

    Raises `OSError` where the connection is gone, `RankError` where the shared memory is.
    """
    payload, sizes, path = connection.recv()
    if path is not None:
        try:
            buffers = _mapped(path, sizes)
        except OSError as error:
            raise RankError(f"what rank 0 has put into shared memory cannot be read: {error}") from error
        return pickle.loads(payload, buffers=buffers)
    received = [bytearray(size) for size in sizes]
    for buffer in received:
        connection.recv_bytes_into(buffer)
    return pickle.loads(payload, buffers=received)


def offer() -> tuple[Probe, int | None]:
    """A probe, and the file to close when all have tried it."""
    content = secrets.token_bytes(32)
    if not hasattr(os, "memfd_create"):
        return Probe(None, content), None
    file = None
    try:
        file, path = _nameless()
        _write(file, memoryview(content), 0)
    except OSError as error:  # a sandbox may forbid it
        log.warning(f"no shared memory, so what other ranks are to learn goes over the connections: {error}")
        if file is not None:
            os.close(file)
        return Probe(None, content), None
    return Probe(path, content), file


def _stays(buffer: pickle.PickleBuffer, large: list[memoryview]) -> bool:
    """Whether an array goes into the pickle; else it joins `large`."""
    raw = buffer.raw()
    if raw.nbytes < LARGE:
        return True
    large.append(raw)
    return False


def _nameless() -> tuple[int, str]:
    """A file in memory, and where other processes of this user find it."""
    file = os.memfd_create("vlmrl")
    return file, f"/proc/{os.getpid()}/fd/{file}"


def _starts(sizes: Sequence[int]) -> list[int]:
    """Where each array begins.

    >>> _starts([10, 64, 1])
    [0, 64, 128]
    """
    starts = [0]
    for size in sizes[:-1]:
        starts.append(starts[-1] + -(-size // ALIGNED) * ALIGNED)
    return starts


def _write(file: int, array: memoryview, start: int) -> None:
    done = 0
    while done < array.nbytes:  # the system writes at most 2 GiB at a time
        done += os.pwrite(file, array[done:], start + done)


def _mapped(path: str, sizes: Sequence[int]) -> list[memoryview]:
    starts = _starts(sizes)
    with open(path, "r+b") as file:
        whole = memoryview(mmap.mmap(file.fileno(), starts[-1] + sizes[-1]))
    return [whole[start : start + size] for start, size in zip(starts, sizes, strict=True)]
