"""A server's command line, and its errors when it cannot start. test_engine.py tests running servers."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vlmrl.config.inference import VllmConfig
from vlmrl.config.model import Dtype
from vlmrl.errors import EngineError
from vlmrl.inference.vllm.arguments import command_line, server_arguments
from vlmrl.inference.vllm.in_server.guard import RequireKey
from vlmrl.inference.vllm.server import VllmServer, vllm_version

CONFIG = VllmConfig(dtype=Dtype.bfloat16, max_model_len=512)


def arguments(version: tuple[int, int] = (0, 32), *, on_cpu: bool = False, **extra: Any) -> dict[str, Any]:
    config = VllmConfig(dtype=Dtype.bfloat16, max_model_len=512, extra_args=extra)
    return server_arguments(config, Path("/ckpt"), version, on_cpu=on_cpu)


def test_the_flags_that_parity_with_the_trainer_needs_are_always_there() -> None:
    words = command_line(arguments())
    assert words[words.index("--logprobs-mode") + 1] == "processed_logprobs"
    assert words[words.index("--dtype") + 1] == "bfloat16"
    assert words[words.index("--max-model-len") + 1] == "512"
    assert "--no-mm-device-do-normalize" in words
    assert "--enable-scale-out" in words
    assert "--no-enforce-eager" in words


def test_vllm_0_26_does_not_get_flags_that_it_does_not_know() -> None:
    words = command_line(arguments((0, 26)))
    assert "--no-mm-device-do-normalize" not in words
    assert "--enable-scale-out" not in words


def test_a_cpu_never_compiles() -> None:
    assert arguments(on_cpu=True)["enforce_eager"] is True


def test_a_cpu_prefills_prompts_whole() -> None:
    on_cpu = arguments(on_cpu=True)
    assert on_cpu["enable_chunked_prefill"] is False
    assert on_cpu["max_num_batched_tokens"] >= on_cpu["max_model_len"]
    assert "enable_chunked_prefill" not in arguments(on_cpu=False)


def test_a_cpu_keeps_no_prefixes_of_recurrent_layers(tmp_path: Path) -> None:
    """vLLM would split prompts at the blocks of its prefix cache."""
    for layers, expected in (("linear_attention", False), ("conv", False), ("full_attention", None)):
        (tmp_path / "config.json").write_text(json.dumps({"text_config": {"layer_types": [layers]}}))
        found = server_arguments(VllmConfig(dtype=Dtype.bfloat16), tmp_path, (0, 32), on_cpu=True)
        assert (found["enable_chunked_prefill"], found.get("enable_prefix_caching")) == (False, expected)


def test_extra_arguments_win() -> None:
    extra = arguments(gpu_memory_utilization=0.3, max_num_seqs=64, middleware=None)
    assert (extra["gpu_memory_utilization"], extra["max_num_seqs"]) == (0.3, 64)
    assert "--middleware" not in command_line(extra)


def test_the_guard_refuses_requests_without_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")

    async def status(path: str, *headers: tuple[bytes, bytes]) -> int:
        statuses = [200]

        async def app(*_: Any) -> None:
            statuses.append(200)

        async def receive() -> dict[str, Any]:
            return {}

        async def send(message: Any) -> None:
            statuses.append(message.get("status", statuses[-1]))

        scope = {"type": "http", "path": path, "headers": list(headers)}
        await RequireKey(app)(scope, receive, send)
        return statuses[-1]

    for path in ("/collective_rpc", "/pause", "/inference/v1/generate", "/metrics"):
        assert asyncio.run(status(path)) == 401
        assert asyncio.run(status(path, (b"authorization", b"Bearer guess"))) == 401
        assert asyncio.run(status(path, (b"authorization", b"Bearer secret"))) == 200
    assert asyncio.run(status("/health")) == 200


def test_an_error_says_what_ended_the_last_launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmrl.inference.vllm.server.vllm_version", lambda: (0, 32))
    log = tmp_path / "vllm_0.log"
    log.write_text(
        "\n== 10:00 vllm serve\nValueError: of the launch before\n"
        "\n== 11:00 vllm serve\n"
        "(APIServer pid=7) WARNING [system_utils.py:255] This can cause errors like `OSError: [Errno 24] Too many`\n"
        "(EngineCore pid=8) ERROR 11-23 [core.py:1330] torch.OutOfMemoryError: no memory\n"
        "RuntimeError: Engine core initialization failed. See root cause above.\n"
        "zmq.error.ZMQError: Socket operation on non-socket\n"
    )
    message = str(VllmServer(CONFIG, 0, tmp_path, log).error("ended"))
    assert re.match(
        r"vLLM server 0 ended: torch.OutOfMemoryError: no memory\. Remedy: .*gpu_memory_utilization.*\nThe end of ",
        message,
    )
    assert "launch before" not in message
    assert message.endswith("Socket operation on non-socket")


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.skipif(vllm_version() is None, reason="vLLM is not installed")
def test_a_server_that_cannot_start_says_why(family_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """The checkpoint has 4096 positions, and the config wants more."""
    config = replace(CONFIG, max_model_len=5000)
    server = VllmServer(config, 0, family_folder("llama3"), tmp_path / "logs" / "vllm_0.log")
    lines: list[str] = []

    async def scenario() -> None:
        async def unhealthy() -> bool:
            return False

        await server.launch()
        await server.wait_healthy(unhealthy, lines.append)

    with pytest.raises(
        EngineError,
        match=r"vLLM server 0 ended with status 1 before it was healthy: ValidationError for ModelConfig: .*"
        r"max_model_len \(5000\) is greater than the derived .*Remedy: lower inference\.max_model_len",
    ) as error:
        asyncio.run(scenario())
    assert "The end of " in str(error.value)
    assert lines
    assert lines[-1].startswith("vLLM server 0: ")
