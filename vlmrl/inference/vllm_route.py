"""The run's own route in its vLLM servers: `POST /vlmrl/generate`, what `/inference/v1/generate` does, in binary.

    body ─▶ unpack_request ─▶ token ids, tensors ─▶ AsyncLLM.generate ─▶ tokens, logprobs, versions ─▶ pack_answer

vLLM's own route reads and writes JSON, through pydantic, on the event loop that also hands out the engine's tokens.
This one is a middleware, vLLM's own way to extend a server, and calls what the other calls. Runs in vLLM's process and
imports it there; servers of `inference.urls` may do without.

Left out: everything that a rollout does not ask for (streaming, several samples, LoRA, stop strings).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from functools import lru_cache
from typing import Any, TypeAlias

from vlmrl.inference.vllm_wire import BANNED_BIAS, ROUTE, RoutedRequest, pack_answer, unpack_request

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]

FORGOTTEN = 409
"""Status where the server does not hold an image that went by its hash."""


class Route:
    """ASGI middleware; answers `ROUTE` itself and leaves everything else to `app`."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != ROUTE:
            return await self._app(scope, receive, send)
        if scope["method"] == "GET":  # is the route there?
            return await _respond(send, 200, b"{}")
        body = await _read(receive)
        if body is None:
            return None
        answering = asyncio.ensure_future(generate(scope["app"].state.engine_client, unpack_request(body)))
        leaving = asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                await _respond(send, *answering.result())
        finally:
            answering.cancel()  # the engine drops what nobody waits for
            leaving.cancel()
        return None


async def generate(engine: Any, request: RoutedRequest) -> tuple[int, bytes]:
    """Status and body of the answer. `engine` is vLLM's `AsyncLLM`."""
    from vllm import SamplingParams
    from vllm.v1.engine.exceptions import EngineDeadError

    header = request.header
    params = SamplingParams(
        temperature=header["temperature"],
        seed=header["seed"],
        max_tokens=header["max_tokens"],
        stop_token_ids=header["stop_token_ids"],
        ignore_eos=True,
        logit_bias=_bias(tuple(header["banned_token_ids"])) or None,
        logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        output_kind=_final_only(),
    )
    is_whole = len(request.documents) == len({hash for hash, _, _ in header["images"]})
    final = None
    try:
        async for output in engine.generate(_engine_input(request), params, header["request_id"]):
            final = output
    except EngineDeadError:
        raise
    except ValueError as error:
        return 400, str(error).encode()
    except Exception as error:  # vLLM raises whatever its cache raised, wrapped
        if is_whole or engine.errored:
            raise
        return FORGOTTEN, str(error).encode()
    assert final is not None, "a request ends with an output"
    completion = final.outputs[0]
    tokens = list(completion.token_ids)
    if not tokens and not is_whole:
        return FORGOTTEN, b"no token"
    spans = getattr(completion, "weight_versions", None)  # 0.26 has none
    versions = None if spans is None else [_span(span) for span in spans]
    logprobs = completion.logprobs
    assert list(logprobs.token_ids) == tokens, "one logprob per token, its own"
    return 200, pack_answer(tokens, logprobs.logprobs, versions, completion.finish_reason or "abort")


def _engine_input(request: RoutedRequest) -> Any:
    from vllm.inputs import mm_input, tokens_input
    from vllm.multimodal.inputs import MultiModalKwargsItem, MultiModalKwargsItems, PlaceholderRange
    from vllm.v1.serial_utils import MsgpackDecoder

    header = request.header
    if not header["images"]:
        return tokens_input(prompt_token_ids=header["token_ids"])
    decoder = MsgpackDecoder(t=MultiModalKwargsItem)
    items = {hash: decoder.decode(document) for hash, document in request.documents.items()}
    return mm_input(
        prompt_token_ids=header["token_ids"],
        mm_kwargs=MultiModalKwargsItems({"image": [items.get(hash) for hash, _, _ in header["images"]]}),
        mm_hashes={"image": [hash for hash, _, _ in header["images"]]},
        mm_placeholders={"image": [PlaceholderRange(offset, length) for _, offset, length in header["images"]]},
    )


def _span(span: Any) -> tuple[str, int, int]:
    if isinstance(span, dict):
        return span["version"], span["start"], span["end"]
    return span.version, span.start, span.end


@lru_cache(maxsize=16)
def _bias(banned: tuple[int, ...]) -> dict[int, float]:
    return dict.fromkeys(banned, BANNED_BIAS)


@lru_cache(maxsize=1)
def _final_only() -> Any:
    from vllm.sampling_params import RequestOutputKind

    return RequestOutputKind.FINAL_ONLY


async def _read(receive: Receive) -> bytes | None:
    """The body; None where the client left before its end."""
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _respond(send: Send, status: int, body: bytes) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})
