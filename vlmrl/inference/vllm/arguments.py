"""How a vLLM server is started: its command-line arguments and its environment variables."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

from vlmrl.config.inference import VllmConfig
from vlmrl.config.model import Dtype
from vlmrl.inference.vllm import old_vllm
from vlmrl.inference.vllm.reported_supports import MOST_LOGPROBS

WeightTransfer: TypeAlias = Literal["nccl", "ipc"]
"""vLLM's names for its engines that receive weights from a trainer's GPU."""

SERVER_FLAGS = {
    # Logprobs of the distribution that was sampled from: after the bias of banned tokens and the temperature.
    "logprobs_mode": "processed_logprobs",
    # Otherwise a checkpoint's own top-k and top-p apply without a message.
    "generation_config": "vllm",
    "worker_extension_cls": "vlmrl.inference.vllm.in_server.worker.WorkerInspector",
    # One line per request would fill the log.
    "disable_uvicorn_access_log": True,
}
"""Arguments that every server needs, also a server of `inference.urls`."""

NEW_FLAGS: dict[str, Any] = {
    # Adds the endpoint /inference/v1/generate.
    "enable_scale_out": True,
    # The renderer has normalized the pixels already; a second time gives wrong logprobs.
    "mm_device_do_normalize": False,
}
"""Arguments that vLLM 0.32 needs in addition; `old_vllm.SERVER_FLAGS` are those of vLLM 0.26."""

WHOLE_PREFILL_TOKENS = 16384
"""`max_num_batched_tokens` on a CPU: one step takes dozens of prompts."""

ENVIRONMENT = {
    "VLLM_SERVER_DEV_MODE": "1",  # the endpoints for weights and caches
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",  # the checkpoint is a folder
}
CPU_ENVIRONMENT = {
    # vLLM compiles one function (a ranking of logprobs) even when told not to compile: 17 s at the first request.
    "TORCHDYNAMO_DISABLE": "1",
    # If workers were bound to cores, those of two replicas would get the same cores, and also take the trainer's.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    # Allows `distributed_executor_backend=uni`: the worker runs in the engine's process, which stays a process of its
    # own.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
IPC_ENVIRONMENT = {
    # CUDA IPC handles arrive as a pickle, so any client that has the API key can run code in the server.
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
}


def server_arguments(
    config: VllmConfig,
    checkpoint: Path,
    version: tuple[int, int],
    *,
    on_cpu: bool,
    weight_transfer: WeightTransfer | None = None,
) -> dict[str, Any]:
    """Arguments of `vllm serve` by name, for vLLM `version`. `config.extra_args` overrides all others."""
    arguments: dict[str, Any] = {
        "model": str(checkpoint),
        "dtype": config.dtype.value,
        "max_model_len": config.max_model_len,
        "tensor_parallel_size": config.tensor_parallel_size,
        "data_parallel_size": config.data_parallel_size,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "enforce_eager": config.enforce_eager or on_cpu,
        "max_logprobs": MOST_LOGPROBS,
        "middleware": "vlmrl.inference.vllm.in_server.guard.RequireKey",
        **SERVER_FLAGS,
        **(old_vllm.SERVER_FLAGS if old_vllm.is_old(version) else NEW_FLAGS),
    }
    if config.dtype is not Dtype.float32:
        # A head in half precision would round the logits, which the trainer computes in float32.
        arguments["hf_overrides"] = {"head_dtype": "float32"}
    if weight_transfer is not None:
        arguments["weight_transfer_config"] = {"backend": weight_transfer}
    if on_cpu:
        # vLLM's CPU engine dies (`CPU Generator does not use offset`) of a seeded request whose prompt is split over
        # two steps. So prompts are prefilled whole, and so are their images: the encoder has the same token budget.
        arguments["enable_chunked_prefill"] = False
        if has_recurrent_layers(checkpoint):
            # To keep the state at the end of a block of the prefix cache, vLLM splits every longer prompt there.
            arguments["enable_prefix_caching"] = False
        arguments["max_num_batched_tokens"] = max(config.max_model_len, WHOLE_PREFILL_TOKENS)
        if config.tensor_parallel_size == 1:
            # In two processes, the engine and its worker would each keep a core busy while they wait for the other.
            arguments["distributed_executor_backend"] = "uni"
    return arguments | config.extra_args


def has_recurrent_layers(checkpoint: Path) -> bool:
    """Whether the language model in the folder `checkpoint` has layers that hand a state from token to token: linear
    attention (Qwen3.5), short convolutions (LFM2)."""
    file = checkpoint / "config.json"
    if not file.exists():
        return False
    config = json.loads(file.read_text(encoding="utf-8"))
    layer_types = (config.get("text_config") or config).get("layer_types") or ()
    return not {"linear_attention", "conv"}.isdisjoint(layer_types)


def command_line(arguments: Mapping[str, Any]) -> list[str]:
    """The words of a command line; an argument that is None is left out.

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


def server_environment(config: VllmConfig, *, on_cpu: bool) -> dict[str, str]:
    """The run's own environment variables plus those that a server needs. On a CPU, variables that the user has set
    override `CPU_ENVIRONMENT`."""
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
