"""A server says what it is before it gets a request, and one that the trainer cannot use is refused by name."""

from __future__ import annotations

import asyncio
import shlex
from collections import Counter
from typing import Any

import httpx
import orjson
import pytest

from vlmrl.config.inference import VllmConfig
from vlmrl.config.model import Dtype
from vlmrl.errors import EngineError
from vlmrl.inference.vllm.client import VllmClient
from vlmrl.inference.vllm.item_encoder import ItemEncoder
from vlmrl.inference.vllm.settings import check_settings

GOOD: dict[str, Any] = {
    "architecture": "Idefics3ForConditionalGeneration",
    "device": "cuda",
    "is_bidirectional": False,
    "has_recurrent_layers": False,
    "has_deepstack": False,
    "image_input_id": 0,
    "logit_scale": 1.0,
    "images": {"fields": [["pixel_values", "flat", False, 4]], "has_gaps": True},
    "dtype": "bfloat16",
    "head_dtype": "float32",
    "quantization": None,
    "max_model_len": 1024,
    "logprobs_mode": "processed_logprobs",
    "max_logprobs": 20,
    "mm_device_do_normalize": False,
    "keeps_images": True,
}


def check(has_route: bool, top_k: int = 0, **changes: Any) -> VllmClient:
    """A server of `inference.urls` that reports `GOOD` with `changes`, after the run has checked it."""

    async def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/collective_rpc":
            assert orjson.loads(request.content)["method"] == "vlmrl_settings"
            return httpx.Response(200, json={"results": [GOOD | changes]})
        return httpx.Response(200 if has_route else 404, json={})

    encoder = ItemEncoder(Dtype.bfloat16)
    client = VllmClient("there", "http://there", None, encoder, Counter(), 60.0, httpx.MockTransport(answer))
    asyncio.run(check_settings(client, VllmConfig(dtype=Dtype.bfloat16), top_k=top_k))
    return client


@pytest.mark.parametrize("has_route", [True, False])
def test_what_a_server_reports_decides_how_images_are_sent(has_route: bool) -> None:
    client = check(has_route)
    assert client.has_route == has_route
    assert client.keeps_images
    assert client.image_fields is not None
    assert client.image_fields.has_gaps


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logprobs_mode": "raw_logprobs"}, r"logprobs_mode=raw_logprobs, so its logprobs .*: start it with"),
        ({"dtype": "float16"}, r"dtype=float16, so it does not round as inference\.dtype says"),
        ({"head_dtype": "bfloat16"}, r"logits in bfloat16, .* --hf-overrides '\{\"head_dtype\": \"float32\"\}'"),
        ({"quantization": "fp8"}, r"quantization=fp8, so its weights are not the trainer's"),
        ({"mm_device_do_normalize": True}, r"mm_device_do_normalize=True, so it normalizes pixels"),
        ({"max_model_len": 512}, r"max_model_len=512, so it refuses prompts"),
        ({"device": "cpu", "is_bidirectional": True}, r"there runs Idefics3\w+ on cpu: an image's tokens attend"),
        (
            {"architecture": "TransformersMultiModalForCausalLM", "has_deepstack": True},
            r"leaves out the deepstack features",
        ),
    ],
)
def test_a_server_that_would_differ_from_the_trainer_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        check(has_route=False, **change)


def test_a_server_that_cannot_report_what_it_samples_from_is_refused() -> None:
    check(has_route=True, top_k=12)
    check(has_route=True, top_k=1024, max_logprobs=-1)
    with pytest.raises(EngineError, match=r"max_logprobs=20, .*top_k=13 samples: start it with --max-logprobs 21"):
        check(has_route=True, top_k=13)
    with pytest.raises(EngineError, match=r"does not report from which tokens .*top_k=12 samples: start it with --mid"):
        check(has_route=False, top_k=12)


def test_a_server_without_vlmrl_is_told_how_to_start() -> None:
    async def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(404, json={"error": {"message": "Not Found"}})

    client = VllmClient(
        "there", "http://there", None, ItemEncoder(Dtype.bfloat16), Counter(), 60.0, httpx.MockTransport(answer)
    )
    with pytest.raises(EngineError, match="vllm serve ") as error:
        asyncio.run(check_settings(client, VllmConfig(dtype=Dtype.bfloat16)))
    words = shlex.split(str(error.value).partition("vllm serve ")[2])
    assert words[words.index("--hf-overrides") + 1] == '{"head_dtype": "float32"}'
    assert words[words.index("--middleware") + 1].endswith("route.Route")
    assert "--worker-extension-cls" in words
