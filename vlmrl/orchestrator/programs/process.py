"""One process of a program, behind the guard that ends whatever it starts (guard.py).

    GuardedProcess.start ─▶ send(line) ─▶ next_object() … ─▶ wait() ─▶ exit status
                       └─▶ stop()      closes the lifeline: the guard kills everything below it

Standard output and error are read all the time, so that a program which prints much does not block, and their ends are
kept (`KEPT_BYTES`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from asyncio.subprocess import PIPE
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

from vlmrl.errors import safe_text
from vlmrl.orchestrator.programs import guard
from vlmrl.types import Printed

KEPT_BYTES = 16 << 10
"""How much of the end of a stream is kept."""

LONGEST_LINE = 16 << 20
"""Bytes of a JSON line. Of a longer line only the end is kept, which is no JSON."""

CHUNK_BYTES = 1 << 16

MOST_LINES = 1000
"""JSON lines that may wait to be read; older ones are forgotten."""

KILL_PATIENCE_S = 10.0
"""Seconds that a guard may take to end everything below it. Then the guard itself is killed, and the program with
it."""


class Tail:
    """Keeps the end of a stream, and hands out its complete lines."""

    def __init__(self) -> None:
        self.kept = bytearray()
        self.is_cut = False
        self.line = bytearray()

    def feed(self, chunk: bytes) -> list[bytes]:
        """Add a chunk; returns the lines that it completes."""
        self.kept += chunk
        if len(self.kept) > KEPT_BYTES:
            del self.kept[:-KEPT_BYTES]
            self.is_cut = True
        first, *rest = chunk.split(b"\n")
        self.line += first
        if len(self.line) > LONGEST_LINE:
            del self.line[:-LONGEST_LINE]
        if not rest:
            return []
        lines = [bytes(self.line), *rest[:-1]]
        self.line = bytearray(rest[-1])
        return lines

    @property
    def text(self) -> str:
        """The end of the stream as text. Bytes that are no UTF-8 are written as escapes."""
        text = bytes(self.kept).decode("utf-8", "backslashreplace")
        return f"…{text}" if self.is_cut else text

    def forget(self) -> None:
        """Begin again, with the output for the next problem."""
        self.kept.clear()
        self.is_cut = False


class GuardedProcess:
    """A program that was started. Use it in one event loop."""

    def __init__(self, process: asyncio.subprocess.Process, lifeline: int) -> None:
        self._process = process
        self._lifeline: int | None = lifeline
        self._out, self._err = Tail(), Tail()
        self._objects: deque[bytes] = deque(maxlen=MOST_LINES)
        self._news = asyncio.Event()
        self._reading = [
            asyncio.ensure_future(self._read(process.stdout, self._out)),
            asyncio.ensure_future(self._read(process.stderr, self._err)),
        ]

    @staticmethod
    async def start(command: Sequence[str], env: Mapping[str, str], cwd: Path | None = None) -> GuardedProcess:
        """Start `command` with the environment `env`. Raises OSError where no process can be started at all; a command
        that is not there ends with `guard.CANNOT_START`."""
        read, write = os.pipe()
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-I", "-S", guard.__file__, str(read)),
                *command,
                stdin=PIPE,
                stdout=PIPE,
                stderr=PIPE,
                env=env,
                cwd=cwd,
                pass_fds=(read,),
                start_new_session=True,
            )
        except BaseException:
            os.close(write)
            raise
        finally:
            os.close(read)
        return GuardedProcess(process, write)

    @property
    def pid(self) -> int:
        """The guard's process."""
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        """Whether the program has ended or closed its standard output."""
        return self._process.returncode is not None or self._reading[0].done()

    @property
    def printed(self) -> Printed:
        """What the program has printed since its start, or since the last `forget`."""
        return Printed(self._out.text, self._err.text)

    def forget(self) -> None:
        """Forget what was printed so far, lines that were not read included."""
        self._out.forget()
        self._err.forget()
        self._objects.clear()

    async def send(self, data: bytes, *, is_last: bool = False) -> None:
        """Write to the program's standard input, and close it after the last data. A program that does not read is no
        error here: it shows in what the program does."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._process.stdin.write(data)
            if is_last:
                self._process.stdin.close()
            await self._process.stdin.drain()

    async def next_object(self) -> bytes | None:
        """The next line of standard output that begins as a JSON object does; None at the end of the output."""
        while not self._objects:
            if self._reading[0].done():
                return None
            self._news.clear()
            await self._news.wait()
        return self._objects.popleft()

    async def wait(self) -> int:
        """Wait until the program and everything below it has ended, and its streams were read; returns its exit status
        as a shell gives it: 128 + the number of the signal that ended it."""
        await asyncio.wait(self._reading)
        return await self._process.wait()

    def stop(self) -> None:
        """Let the guard end the program. Returns at once; may be called at any time, also twice."""
        if self._lifeline is not None:
            os.close(self._lifeline)
            self._lifeline = None

    async def gone(self) -> None:
        """`stop`, and wait until everything has ended."""
        self.stop()
        try:
            async with asyncio.timeout(KILL_PATIENCE_S):
                await self._process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGKILL)
            await self._process.wait()
        for reading in self._reading:
            reading.cancel()
        await asyncio.wait(self._reading)
        if self._process.stdin is not None:
            self._process.stdin.close()

    async def _read(self, stream: asyncio.StreamReader | None, tail: Tail) -> None:
        assert stream is not None
        try:
            while chunk := await stream.read(CHUNK_BYTES):
                self._keep(tail, tail.feed(chunk))
            self._keep(tail, [bytes(tail.line)])  # a last line without its end
        finally:
            asyncio.get_running_loop().call_soon(self._news.set)  # when this task is done

    def _keep(self, tail: Tail, lines: Sequence[bytes]) -> None:
        if tail is self._out and (objects := [line for line in lines if line.lstrip().startswith(b"{")]):
            self._objects += objects
            self._news.set()


def end_in_words(status: int) -> str:
    """How a program ended.

    >>> end_in_words(3), end_in_words(137), end_in_words(127)
    ('exit code 3', 'SIGKILL', 'exit code 127')
    """
    if status > 128:
        with contextlib.suppress(ValueError):
            return signal.Signals(status - 128).name
    return f"exit code {status}"


def last_lines(text: str, count: int = 10) -> str:
    """The last lines of an output that are not empty, for the text of a fault."""
    lines = [line for line in safe_text(text).splitlines() if line.strip()]
    return "\n".join(lines[-count:])
