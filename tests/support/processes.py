"""Start Python processes for tests: the one place that does.

    process = start("-m", "vlmrl", "seed=1", cwd=folder, environment=environment)
    out, err = process.communicate(timeout=60)

A process is forked from a server that has imported torch, transformers and vlmrl already (`support.warm`), which saves
four seconds of processor time for each. `cold=True` starts a new interpreter instead: for what a test says about
imports or about start-up itself.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, TypedDict, Unpack

from support import TESTS

IMPORT_TIMEOUT_S = 120.0
"""Seconds that the server may take to import everything on a busy machine."""

READ_AT_IMPORT = re.compile(r"(OMP|MKL|OPENBLAS|HF|TRANSFORMERS|TORCH|TOKENIZERS|PYTHON|CUDA|LD|LC|LANG|VLLM|COLUMNS)")
"""Names of environment variables, or how they begin, that libraries read while they are imported. Processes that differ
in one of them come from different servers."""


class Process(Protocol):
    """What tests use of `subprocess.Popen[str]`."""

    pid: int
    returncode: int

    def poll(self) -> int | None: ...

    def send_signal(self, sig: int) -> None: ...

    def kill(self) -> None: ...

    def communicate(self, input: str | None = None, timeout: float | None = None) -> tuple[str, str]: ...


class Options(TypedDict, total=False):
    """How a process differs from the usual."""

    cold: bool
    """A new interpreter, nothing imported."""
    new_session: bool
    """As `start_new_session` of Popen."""
    file_size_limit: int
    """Bytes; stands in for a full disk: no file of the process may become larger."""


def start(*command: str, cwd: Path, environment: Mapping[str, str], **options: Unpack[Options]) -> Process:
    """`python <command>` in the folder `cwd`, running, with its output piped."""
    new_session, file_size_limit = options.get("new_session", False), options.get("file_size_limit")
    if options.get("cold", False):
        assert file_size_limit is None
        return subprocess.Popen(
            [sys.executable, *command],
            cwd=cwd,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=new_session,
        )
    request = {"command": command, "cwd": str(Path(cwd).absolute()), "environment": dict(environment)}
    return _server(environment).start({**request, "new_session": new_session, "file_size_limit": file_size_limit})


class ForkedProcess:
    """A process of the server, with the methods of `subprocess.Popen` that tests use."""

    def __init__(self, pid: int, out: int, err: int) -> None:
        self.pid = pid
        self.returncode: int = None  # type: ignore[assignment]  # as Popen has it before the end
        self._ended = threading.Event()
        self._texts = ["", ""]
        self._readers = [
            threading.Thread(target=self._read, args=(number, descriptor), daemon=True)
            for number, descriptor in enumerate((out, err))
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, number: int, descriptor: int) -> None:
        with open(descriptor, encoding="utf-8") as pipe:
            self._texts[number] = pipe.read()

    def has_ended(self, code: int) -> None:
        """Called when the server has seen it end."""
        self.returncode = code
        self._ended.set()

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        return self.returncode if self._ended.is_set() else None

    def send_signal(self, sig: int) -> None:
        """Send a signal, unless it has ended."""
        if not self._ended.is_set():
            os.kill(self.pid, sig)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, input: str | None = None, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end → standard output and standard error. Raises `subprocess.TimeoutExpired`."""
        assert input is None, "nothing can be written to it"
        until = None if timeout is None else time.monotonic() + timeout

        def left() -> float | None:
            return None if until is None else max(0.0, until - time.monotonic())

        for reader in self._readers:  # what it started may hold the pipes longer than it lives, as with Popen
            reader.join(left())
        if any(reader.is_alive() for reader in self._readers) or not self._ended.wait(left()):
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
        return self._texts[0], self._texts[1]


class _Server:
    """The client's side of `support.warm`."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        here, there = socket.socketpair()
        path = os.pathsep.join(filter(None, [str(TESTS), environment.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "support.warm", str(there.fileno())],
            env={**environment, "PYTHONPATH": path},
            pass_fds=[there.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        there.close()
        self._connection = here
        self._lock = threading.Lock()
        self._started: dict[int, ForkedProcess] = {}
        self._early: dict[int, int] = {}  # processes that ended before `start` had their pid
        self._pid: list[int] = []
        self._answered = threading.Condition()
        self._lines = here.makefile("r")
        here.settimeout(IMPORT_TIMEOUT_S)
        assert json.loads(self._lines.readline()) == {"ready": True}, "the server of processes did not come up"
        here.settimeout(None)
        threading.Thread(target=self._listen, daemon=True).start()
        atexit.register(self.close)

    def start(self, request: Mapping[str, object]) -> ForkedProcess:
        """The process that a request asks for (`support.warm`), running."""
        (out, out_write), (err, err_write) = os.pipe(), os.pipe()
        with self._lock, self._answered:
            socket.send_fds(self._connection, [json.dumps(request).encode()], [out_write, err_write])
            os.close(out_write)
            os.close(err_write)
            self._answered.wait_for(lambda: self._pid, IMPORT_TIMEOUT_S)
            process = ForkedProcess(self._pid.pop(), out, err)
            self._started[process.pid] = process
            if process.pid in self._early:
                process.has_ended(self._early.pop(process.pid))
        return process

    def _listen(self) -> None:
        for line in self._lines:
            message = json.loads(line)
            with self._answered:
                if "code" not in message:
                    self._pid.append(message["pid"])
                    self._answered.notify()
                elif message["pid"] in self._started:
                    self._started.pop(message["pid"]).has_ended(message["code"])
                else:
                    self._early[message["pid"]] = message["code"]

    @property
    def is_idle(self) -> bool:
        """Whether no process of it runs."""
        with self._answered:
            return not self._started

    def close(self) -> None:
        """End the server; processes that still run go on."""
        self._connection.shutdown(socket.SHUT_RDWR)
        self._process.wait()
        self._lines.close()
        self._connection.close()


MOST_SERVERS = 6
"""Servers that are kept; each holds about 330 MB."""

_servers: dict[frozenset[tuple[str, str]], _Server] = {}
"""By what they have read from the environment; the one that was asked last is last."""


def _server(environment: Mapping[str, str]) -> _Server:
    read = frozenset((name, value) for name, value in environment.items() if READ_AT_IMPORT.match(name))
    if read not in _servers:
        idle = [key for key, server in _servers.items() if server.is_idle]
        for key in idle[: max(0, len(_servers) + 1 - MOST_SERVERS)]:
            server = _servers.pop(key)
            atexit.unregister(server.close)
            server.close()
        _servers[read] = _Server(environment)
    _servers[read] = _servers.pop(read)
    return _servers[read]
