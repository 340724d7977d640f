"""Compares the settings of a server that has just come up with those that the trainer needs."""

from __future__ import annotations

from vlmrl.config.inference import VllmConfig
from vlmrl.errors import EngineError
from vlmrl.inference.vllm.arguments import NEW_FLAGS, SERVER_FLAGS, command_line
from vlmrl.inference.vllm.client import VllmClient
from vlmrl.inference.vllm.frames import ROUTE


async def check_settings(client: VllmClient, config: VllmConfig) -> None:
    """Read a server's settings into `client`. Raises `EngineError` where the trainer cannot use its samples."""
    try:
        (settings, *_) = await client.call_workers("vlmrl_settings")
    except EngineError as error:
        flags = command_line(SERVER_FLAGS | NEW_FLAGS)
        raise EngineError(
            f"{error}. Start a server of inference.urls with VLLM_SERVER_DEV_MODE=1, with vlmrl on its PYTHONPATH, by: "
            f"vllm serve {' '.join(flags)}"
        ) from error
    demands = [
        ("logprobs_mode", "processed_logprobs", "its logprobs are not those of the distribution that it samples from"),
        ("mm_device_do_normalize", False, "it normalizes pixels that are normalized already"),
        ("dtype", config.dtype.value, "it does not round as inference.dtype says"),
    ]
    for name, value, consequence in demands:
        if settings[name] != value:
            raise EngineError(
                f"{client.name} runs with {name}={settings[name]}, so {consequence}: start it with {name}={value}"
            )
    if settings["max_model_len"] < config.max_model_len:
        raise EngineError(
            f"{client.name} runs with max_model_len={settings['max_model_len']}, so it refuses prompts that "
            f"inference.max_model_len={config.max_model_len} allows: raise it there or lower inference.max_model_len"
        )
    client.keeps_images = settings["keeps_images"]
    client.has_route = await client.call("GET", ROUTE, optional=True) is not None
