"""Standard output and standard error that cannot end a run.

    python -m vlmrl … | head        the reader leaves: a write fails with EPIPE
    python -m vlmrl … > log         the disk is full: ENOSPC
    ssh host python -m vlmrl …      the terminal goes away: EIO

Inside `unbreakable_output`, the first write that fails replaces the descriptor by /dev/null, so that later writes of
anything in this process succeed. The run goes on: logs/main.log and the run directory have what the screen would have
shown. Failing streams are reported once, by `lost_streams`.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import sys
from collections.abc import Iterator
from typing import Any

NAMES = {1: "standard output", 2: "standard error"}

BUSY_TIMEOUT_MS = 1000
"""How long a write waits for the reader of a pipe that does not block. Then the text is left out."""

_lost: list[str] = []


def lost_streams() -> list[str]:
    """A sentence for each stream that has failed since the last call."""
    found, _lost[:] = list(_lost), []
    return found


class _UnbreakableFile(io.FileIO):
    """A file descriptor whose writes never fail."""

    def write(self, data: object) -> int:
        view = memoryview(data).cast("B")  # type: ignore[arg-type]  # bytes or another buffer
        done = 0
        try:
            while done < len(view):
                written: int | None = super().write(view[done:])
                if written is None and not self._is_writable_soon():
                    break
                done += written or 0
        except OSError as error:
            _lost.append(
                f"{NAMES.get(self.fileno(), 'a stream')} cannot be written any more ({error.strerror}): "
                "the run goes on without it"
            )
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
        return len(view)

    def _is_writable_soon(self) -> bool:
        """Wait for the reader of a full pipe that does not block."""
        poll = select.poll()
        poll.register(self.fileno(), select.POLLOUT)
        return bool(poll.poll(BUSY_TIMEOUT_MS))


@contextlib.contextmanager
def unbreakable_output() -> Iterator[None]:
    """Replace `sys.stdout` and `sys.stderr` inside the block. Streams that are no files of the process stay."""
    _occupy_standard_descriptors()
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_unbreakable(stream, number) for number, stream in enumerate(before, 1))
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(ValueError):  # somebody has closed it
                stream.flush()
        sys.stdout, sys.stderr = before


def _unbreakable(stream: object, number: int) -> io.TextIOBase:
    """A stream like `stream` on a descriptor whose writes never fail."""
    if stream is None:  # the process was started with the descriptor closed
        return io.TextIOWrapper(_buffered(number), encoding="utf-8", errors="backslashreplace", line_buffering=True)
    assert isinstance(stream, io.TextIOBase)
    if not isinstance(stream, io.TextIOWrapper) or not isinstance(stream.buffer, io.BufferedWriter | io.FileIO):
        return stream
    with contextlib.suppress(OSError):
        stream.flush()
    is_buffered = isinstance(stream.buffer, io.BufferedWriter)  # not with PYTHONUNBUFFERED
    file: Any = _buffered(stream.fileno()) if is_buffered else _UnbreakableFile(stream.fileno(), "wb", closefd=False)
    return io.TextIOWrapper(
        file,
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _buffered(descriptor: int) -> io.BufferedWriter:
    return io.BufferedWriter(_UnbreakableFile(descriptor, "wb", closefd=False))


def _occupy_standard_descriptors() -> None:
    """Open /dev/null where the process was started with one of the descriptors 0 to 2 closed: otherwise a file of the
    run would get that number, and what a library prints would be written into it."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
