"""Compares the settings of a server that has just come up with those that the trainer needs."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from vlmrl.config.inference import VllmConfig
from vlmrl.config.model import Dtype
from vlmrl.errors import EngineError
from vlmrl.inference.vllm.arguments import NEW_FLAGS, SERVER_FLAGS, command_line
from vlmrl.inference.vllm.client import ROUTE_FLAG, VllmClient
from vlmrl.inference.vllm.frames import ROUTE
from vlmrl.inference.vllm.image_fields import ImageFields
from vlmrl.inference.vllm.reported_supports import TIES


async def check_settings(
    client: VllmClient, config: VllmConfig, logit_scale: float | None = None, top_k: int = 0
) -> None:
    """Read a server's settings into `client`. Raises `EngineError` where the trainer cannot use its samples.
    `logit_scale`: what the trainer's model multiplies its logits by; None where it is not known. `top_k`: that of the
    run; 0 where it samples from the whole distribution."""
    try:
        (settings, *_) = await client.call_workers("vlmrl_settings")
    except EngineError as error:
        head = {} if config.dtype is Dtype.float32 else {"hf_overrides": {"head_dtype": "float32"}}
        flags = [shlex.quote(word) for word in command_line(SERVER_FLAGS | NEW_FLAGS | head)]
        raise EngineError(
            f"{error}. Start a server of inference.urls with VLLM_SERVER_DEV_MODE=1, with vlmrl on its PYTHONPATH, by: "
            f"vllm serve {' '.join(flags)} {ROUTE_FLAG}"
        ) from error
    demands = [
        ("logprobs_mode", "processed_logprobs", "its logprobs are not those of the distribution that it samples from"),
        ("mm_device_do_normalize", False, "it normalizes pixels that are normalized already"),
        ("dtype", config.dtype.value, "it does not round as inference.dtype says"),
        ("quantization", None, "its weights are not the trainer's"),
    ]
    for name, value, consequence in demands:
        if settings[name] != value:
            raise EngineError(
                f"{client.name} runs with {name}={settings[name]}, so {consequence}: start it with {name}={value}"
            )
    if settings["head_dtype"] != "float32":
        raise EngineError(
            f"{client.name} computes logits in {settings['head_dtype']}, and the trainer computes them in float32, so "
            'logprobs would differ by the rounding: start it with --hf-overrides \'{"head_dtype": "float32"}\''
        )
    if settings["max_model_len"] < config.max_model_len:
        raise EngineError(
            f"{client.name} runs with max_model_len={settings['max_model_len']}, so it refuses prompts that "
            f"inference.max_model_len={config.max_model_len} allows: raise it there or lower inference.max_model_len"
        )
    for consequence in [*unfaithful(settings), *other_scale(settings, logit_scale)]:
        raise EngineError(f"{client.name} runs {settings['architecture']} on {settings['device']}: {consequence}")
    client.image_fields = None if settings["images"] is None else ImageFields.of(settings["images"])
    client.keeps_images = settings["keeps_images"]
    client.has_route = await client.call("GET", ROUTE, optional=True) is not None
    if top_k and not client.has_route:
        raise EngineError(
            f"{client.name} does not report from which tokens orchestrator.top_k={top_k} samples: start it with "
            f"{ROUTE_FLAG}"
        )
    if top_k and settings["max_logprobs"] != -1 and settings["max_logprobs"] < top_k + TIES:
        raise EngineError(
            f"{client.name} runs with max_logprobs={settings['max_logprobs']}, so it does not report from which tokens "
            f"orchestrator.top_k={top_k} samples: start it with --max-logprobs {top_k + TIES}"
        )


def other_scale(settings: Mapping[str, Any], logit_scale: float | None) -> Iterator[str]:
    """Why this server samples at another temperature than the trainer's model computes with.

    >>> list(other_scale({"logit_scale": 0.25, "dtype": "float32"}, 0.25))
    []
    """
    served = settings["logit_scale"]
    if logit_scale is not None and not math.isclose(served, logit_scale, rel_tol=1e-6):
        head = "" if settings["dtype"] == "float32" else "head_dtype:float32,"
        yield (
            f"vLLM multiplies logits by {served:g}, and the trainer's model in transformers by {logit_scale:g} (Aya "
            "Vision's class ignores the logit_scale of its config), so each would have a temperature of its own: set "
            f"inference.extra_args.hf_overrides={{{head}text_config:{{logit_scale:{float(logit_scale)!r}}}}}"
        )


def unfaithful(settings: Mapping[str, Any]) -> Iterator[str]:
    """Why this server's logprobs would differ from the trainer's, although nothing in its answers shows it.

    Measured with vLLM 0.32 against transformers' forward, in float32.
    """
    if settings["is_bidirectional"] and settings["device"] == "cpu":
        yield (
            "an image's tokens attend to each other in this model, but vLLM's attention on a CPU is causal for them, "
            "so logprobs would be wrong by up to 0.9 nats: set inference=embedded, or run the servers on a GPU"
        )
    if settings["has_recurrent_layers"] and settings["device"] == "cpu" and settings["dtype"] == "float32":
        yield (
            "its linear attention on a CPU takes bfloat16 only, and the engine dies of the first request: set "
            "inference.dtype=bfloat16 or inference=embedded"
        )
    if settings["has_deepstack"] and settings["architecture"].startswith("Transformers"):
        yield (
            "this back-end of vLLM leaves out the deepstack features of images, so logprobs would be wrong by 0.7 "
            "nats: remove model_impl from inference.extra_args"
        )
    if settings["image_input_id"] != 0:
        yield (
            f"vLLM gives image positions the per-layer inputs of token 0, transformers those of pad_token_id="
            f"{settings['image_input_id']}, so logprobs would be wrong by 0.4 nats: set inference=embedded"
        )
