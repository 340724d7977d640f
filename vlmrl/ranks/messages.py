"""How a message travels from rank 0 to another rank: as a pickle, with its large arrays (pixels) outside of it.

    message ─▶ pickle protocol 5 ─┬─ small ────────────────────────────────▶ over the connection
                                  └─ arrays of at least 64 KiB ─┬─ same host: one copy into shared memory
                                                                └─ other host: one by one over the connection

Shared memory is an anonymous file (memfd) that both processes map. It vanishes when both have closed it, even where one
was killed. Whether two ranks share memory is tried when they meet (`Probe`) rather than concluded from host names,
because containers on one host may not see each other's processes.
"""

from __future__ import annotations

import hashlib
import logging
import mmap
import os
import pickle
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from vlmrl.errors import RankError

LARGE_ARRAY_BYTES = 64 * 1024
"""Arrays of at least this size travel outside the pickle."""

KEY_BYTES = 32
"""Size of a run's key."""

ALIGNMENT_BYTES = 64
"""Every array in shared memory begins at a multiple of this."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Probe:
    """A piece of rank 0's memory, with the key of the run in it, which only processes of the same user can read. A rank
    that reads it shares memory with rank 0. A probe itself is no secret."""

    path: str | None
    """None where this system has no such memory."""
    digest: str
    """The SHA-256 of the key, in hexadecimal digits."""

    def read(self) -> bytes | None:
        """The key; None where this process cannot read rank 0's memory."""
        if self.path is None:
            return None
        try:
            about = os.stat(self.path)
            # On another host the path may be any file, even one that this process has open. Reading a pipe would hang.
            # Another user may have written the path: an anonymous file of ours has our owner and no name.
            if not stat.S_ISREG(about.st_mode) or about.st_size != KEY_BYTES:
                return None
            if about.st_uid != os.geteuid() or about.st_nlink != 0:
                return None
            with open(self.path, "r+b") as file:  # the mode that `_mapped` uses
                content = file.read(KEY_BYTES)
        except OSError:
            return None
        return content if hashlib.sha256(content).hexdigest() == self.digest else None


class Outbox:
    """Rank 0's end of a connection. It sends one message at a time: call `answered` before the next `send`."""

    def __init__(self, connection: Connection[Any, Any], *, shares_memory: bool) -> None:
        self._connection = connection
        self._shares_memory = shares_memory
        self._file: int | None = None
        """The shared memory of the last message; None where it used none, or was answered."""

    def send(self, message: object) -> None:
        """Send a message; returns when all of it is in shared memory or written to the connection."""
        large: list[memoryview] = []
        payload = pickle.dumps(message, protocol=5, buffer_callback=lambda buffer: _is_small(buffer, large))
        sizes = [each.nbytes for each in large]
        path = self._share(large) if self._shares_memory and large else None
        self._connection.send((payload, sizes, path))
        if path is None:
            for each in large:
                self._connection.send_bytes(each)

    def answered(self) -> None:
        """Close the shared memory of the last message, which the other rank has received. That rank keeps its own
        mapping for as long as it needs the arrays."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _share(self, arrays: Sequence[memoryview]) -> str | None:
        assert self._file is None, "the last message is not answered"
        try:
            self._file, path = _memory_file()
            for array, start in zip(arrays, _starts([each.nbytes for each in arrays]), strict=True):
                _write(self._file, array, start)
        except OSError as error:
            log.warning(f"no shared memory for the arrays of a message, so they go over the connection: {error}")
            self.answered()
            return None
        return path


def receive(connection: Connection[Any, Any], heard: Callable[[], None] = lambda: None) -> Any:
    """Receive the next message of an `Outbox`, and call `heard` with every piece of it. Changing its arrays does not
    change the sender's; arrays that were read-only for the sender are read-only here.

    Raises `OSError` where the connection is closed, and `RankError` where the shared memory cannot be read.
    """
    payload, sizes, path = connection.recv()
    heard()
    if path is not None:
        try:
            buffers = _mapped(path, sizes)
        except OSError as error:
            raise RankError(f"the shared memory with rank 0's message cannot be read: {error}") from error
        return pickle.loads(payload, buffers=buffers)
    received = [bytearray(size) for size in sizes]
    for buffer in received:
        connection.recv_bytes_into(buffer)
        heard()
    return pickle.loads(payload, buffers=received)


def offer(key: bytes) -> tuple[Probe, int | None]:
    """Create a probe → the probe, and the file to close when all ranks have tried it (None where there is none)."""
    digest = hashlib.sha256(key).hexdigest()
    if not hasattr(os, "memfd_create"):
        return Probe(None, digest), None
    file = None
    try:
        file, path = _memory_file()
        _write(file, memoryview(key), 0)
    except OSError as error:  # a sandbox may forbid it
        log.warning(f"no shared memory, so arrays for other ranks go over the connections: {error}")
        if file is not None:
            os.close(file)
        return Probe(None, digest), None
    return Probe(path, digest), file


def _is_small(buffer: pickle.PickleBuffer, large: list[memoryview]) -> bool:
    """Whether an array stays in the pickle; otherwise it is appended to `large`."""
    raw = buffer.raw()
    if raw.nbytes < LARGE_ARRAY_BYTES:
        return True
    large.append(raw)
    return False


def _memory_file() -> tuple[int, str]:
    """Create an anonymous file in memory → its descriptor, and the path by which this user's processes can open it."""
    file = os.memfd_create("vlmrl")
    return file, f"/proc/{os.getpid()}/fd/{file}"


def _starts(sizes: Sequence[int]) -> list[int]:
    """The offset of each array in shared memory, in bytes.

    >>> _starts([10, 64, 1])
    [0, 64, 128]
    """
    starts = [0]
    for size in sizes[:-1]:
        starts.append(starts[-1] + -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES)
    return starts


def _write(file: int, array: memoryview, start: int) -> None:
    done = 0
    while done < array.nbytes:  # one pwrite writes at most 2 GiB
        done += os.pwrite(file, array[done:], start + done)


def _mapped(path: str, sizes: Sequence[int]) -> list[memoryview]:
    starts = _starts(sizes)
    with open(path, "r+b") as file:
        whole = memoryview(mmap.mmap(file.fileno(), starts[-1] + sizes[-1]))
    return [whole[start : start + size] for start, size in zip(starts, sizes, strict=True)]
