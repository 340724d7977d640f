"""The endpoint that the run adds to its vLLM servers: `POST /vlmrl/generate` is `/inference/v1/generate` for batches.

    body ─▶ unpack_batch ─┬▶ data of images ─▶ items ─▶ kept until the first request with the image takes it
                          └▶ each request ─▶ AsyncLLM.add_request ─▶ tokens, logprobs, versions ─▶ pack_answer
    the response begins when the engine has all requests of the batch; then it gets a frame for each finished request

vLLM's own endpoint needs one HTTP request per completion, and reads and writes JSON through pydantic on the event loop
that also distributes the engine's tokens. This endpoint is a middleware, which is vLLM's own way to extend a server,
and calls the same methods of the engine. It runs in vLLM's process and imports vLLM there. Servers of `inference.urls`
work without it.

The engine processes requests in the order in which they are added, and caches their images. So a later request may
refer to an image of an earlier one by its hash. A weight update pauses the engine, and requests that come after it do
not share prefixes with older ones, whose keys and values may be those of the older weights.

Left out on purpose: everything that a rollout does not use (several samples per request, LoRA).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from copy import copy
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np

from vlmrl.caches.lru import ByteLRU
from vlmrl.inference.vllm import old_vllm
from vlmrl.inference.vllm.frames import FORGOTTEN, ROUTE, check_request, pack_answer, pack_error, unpack_batch
from vlmrl.inference.vllm.in_server.items import ItemMaker
from vlmrl.inference.vllm.reported_supports import supports_of
from vlmrl.inference.vllm.wire import BANNED_BIAS, MAX_LISTED_TOKENS

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]

WAITING_LIMIT_BYTES = 1024**3
"""Limit on the data of images that no request has taken yet. Past the limit the oldest image is dropped, as if the
engine had forgotten it."""


class Route:
    """ASGI middleware that answers requests to `ROUTE` and passes all others to `app`."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._app = app
        self._waiting = WaitingImages(WAITING_LIMIT_BYTES)
        self._maker = ItemMaker()
        self._pauses = 0
        """How often the engine was paused; part of the key of the prefix cache."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != ROUTE:
            self._pauses += scope["type"] == "http" and scope["path"] == "/pause"
            return await self._app(scope, receive, send)
        if scope["method"] == "GET":  # the client checks whether the endpoint exists
            return await _respond(send, b"{}")
        body = await _read(receive)
        if body is None:
            return None
        batch = unpack_batch(body)
        engine = scope["app"].state.engine_client
        frames: asyncio.Queue[bytes | BaseException | None] = asyncio.Queue()
        """Frames of answers; an exception that ends the batch; None when the client has disconnected."""
        disconnected = asyncio.ensure_future(_wait_for_disconnect(receive))
        disconnected.add_done_callback(lambda _: frames.put_nowait(None))
        answering: list[asyncio.Task[None]] = []
        try:
            # In a thread, because an image takes milliseconds.
            items: dict[str, Any] = {}
            if batch.documents:
                items = await asyncio.to_thread(self._maker.make, batch.documents, engine.model_config)
            if not batch.requests:
                refusals = [item for item in items.values() if isinstance(item, ValueError)]
                if refusals:
                    return await _respond(send, str(refusals[0]).encode(), 400)
                self._waiting.add({hash: (item, len(batch.documents[hash])) for hash, item in items.items()})
                return await _respond(send, b"")
            for number, header in enumerate(batch.requests):
                try:
                    check_request(header)
                    self._maker.check_layouts(header["items"])
                    shown = items if header["is_whole"] else self._waiting.take(header["items"])
                    outputs = await engine.add_request(
                        header["request_id"],
                        _engine_input(header, shown) | {"cache_salt": f"after {self._pauses} pauses"},
                        _sampling_params(header, engine.model_config.get_vocab_size()),
                    )
                except Exception as error:  # a malformed request, or one that vLLM refuses by a class of its own
                    if engine.errored:
                        raise
                    frames.put_nowait(pack_error(number, 400, str(error)))
                    continue
                answering.append(asyncio.create_task(_answer(engine, number, header, outputs, frames)))
                await asyncio.sleep(0)  # let the event loop read images that have arrived in the meantime
            await _stream_frames(send, frames, len(batch.requests))
        finally:
            disconnected.cancel()
            for task in answering:
                task.cancel()  # which makes the engine drop the request
        return None


class WaitingImages:
    """Images that the server has received and the engine has not.

    >>> waiting = WaitingImages(limit_bytes=5)
    >>> waiting.add({"a": ("A", 3), "b": ("B", 2), "c": ("C", 1)})
    >>> waiting.take([["b", 0, 1], ["c", 1, 1], ["a", 2, 1]]), waiting.take([["b", 0, 1]])
    ({'b': 'B', 'c': 'C'}, {})
    """

    def __init__(self, limit_bytes: int) -> None:
        self._items: ByteLRU[str, Any] = ByteLRU(limit_bytes)

    def add(self, items: Mapping[str, tuple[Any, int]]) -> None:
        """`items` maps the hash of an image to vLLM's item for it and its size in bytes."""
        for hash, (item, num_bytes) in items.items():
            self._items.put(hash, item, num_bytes)

    def take(self, shown: list[list[Any]]) -> dict[str, Any]:
        """Remove the items of `shown` (as in `frames.Batch.requests`) that are here → hash to item."""
        hashes = dict.fromkeys(hash for hash, *_ in shown)
        return {hash: self._items.pop(hash) for hash in hashes if hash in self._items}


async def _answer(
    engine: Any,
    number: int,
    header: Mapping[str, Any],
    outputs: Any,
    frames: asyncio.Queue[bytes | BaseException | None],
) -> None:
    """Wait for vLLM's final output of a request and put its frame into `frames`."""
    try:
        frames.put_nowait(await _frame(engine, number, header, outputs))
    except asyncio.CancelledError:
        await engine.abort(outputs.request_id, internal=True)
        raise
    except Exception as error:  # noqa: BLE001 — __call__ raises it again
        frames.put_nowait(error)


async def _frame(engine: Any, number: int, header: Mapping[str, Any], outputs: Any) -> bytes:
    """The frame of a request, from vLLM's queue of `outputs`. Raises what vLLM raises when its engine has died."""
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        final = outputs.get_nowait() or await outputs.get()
        while not final.finished:
            final = outputs.get_nowait() or await outputs.get()
    except EngineDeadError:
        raise
    except ValueError as error:
        return pack_error(number, 400, str(error))
    except Exception as error:  # vLLM wraps what its image cache raises for a missing image
        if engine.errored:
            raise
        return pack_error(number, 500 if header["is_whole"] else FORGOTTEN, str(error))
    completion = final.outputs[0]
    tokens = list(completion.token_ids)
    is_aborted = completion.finish_reason == "abort"
    if not is_aborted and old_vllm.has_forgotten_image(len(tokens), has_hashes=not header["is_whole"]):
        return pack_error(number, FORGOTTEN, "no token")
    spans = old_vllm.weight_versions(completion)
    versions = None if spans is None else [_span(span) for span in spans]
    # For each token: the token itself, then the most probable ones that the request asks for.
    width = max(1, len(completion.logprobs.token_ids) // max(1, len(tokens)))
    ids = np.array(completion.logprobs.token_ids, np.int64).reshape(len(tokens), width)
    logprobs = np.array(completion.logprobs.logprobs, np.float32).reshape(len(tokens), width)
    assert ids[:, 0].tolist() == tokens, "vLLM gives the logprob of each token itself first"
    try:
        supports = supports_of(ids, logprobs) if header["reported"] else None
    except ValueError as error:
        return pack_error(number, 400, str(error))
    return pack_answer(number, tokens, logprobs[:, 0].tolist(), versions, completion.finish_reason or "abort", supports)


def _sampling_params(header: Mapping[str, Any], vocabulary: int) -> Any:
    stops, banned = tuple(header["stop_token_ids"]), tuple(map(tuple, header["banned"]))
    shape = (header["temperature"], header["top_p"], header["top_k"], header["min_p"])
    reported = min(header["reported"], vocabulary)
    params = copy(_sampling(shape, reported, header["max_tokens"], stops, tuple(header["stop"]), banned, vocabulary))
    params.seed = header["seed"]
    return params


@lru_cache(maxsize=16)
def _sampling(
    shape: tuple[float, float, int, float],
    reported: int,
    max_tokens: int,
    stops: tuple[int, ...],
    texts: tuple[str, ...],
    banned: tuple[tuple[int, int], ...],
    vocabulary: int,
) -> Any:
    """The sampling parameters that a run's requests share. Cached, because vLLM would process the hundreds of banned
    tokens again for each request, which would take longer than everything else. `shape`: temperature, top_p, top_k,
    min_p. `reported`: most probable tokens whose logprobs are reported besides that of the sampled token.
    `texts`: stop strings, which the server finds in the text. Only the tokens are read, so it may keep them there."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    temperature, top_p, top_k, min_p = shape
    return SamplingParams(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        seed=0,  # `_sampling_params` sets the request's own
        max_tokens=max_tokens,
        stop_token_ids=list(stops),
        stop=list(texts),
        include_stop_str_in_output=True,
        ignore_eos=True,
        logprobs=reported,
        flat_logprobs=True,
        detokenize=bool(texts),
        output_kind=RequestOutputKind.FINAL_ONLY,
        skip_clone=True,
        **_ban(banned, vocabulary),
    )


def _ban(banned: tuple[tuple[int, int], ...], vocabulary: int) -> dict[str, Any]:
    """Ban the tokens of all runs [first, end), by a bias or by the list of the other tokens: vLLM limits both.

    >>> _ban(((3, 5),), 8), _ban((), 8), _ban(((2, 5000),), 5001)
    ({'logit_bias': {3: -1e+30, 4: -1e+30}}, {}, {'allowed_token_ids': [0, 1, 5000]})
    """
    count = sum(end - first for first, end in banned)
    if count <= MAX_LISTED_TOKENS:
        bias = {token: BANNED_BIAS for first, end in banned for token in range(first, end)}
        return {"logit_bias": bias} if bias else {}
    edges = [0, *(edge for run in banned for edge in run), vocabulary]
    allowed = [token for first, end in zip(edges[::2], edges[1::2], strict=True) for token in range(first, end)]
    if len(allowed) > MAX_LISTED_TOKENS:
        raise ValueError(
            f"{count} tokens are banned and {len(allowed)} are not: vLLM takes at most {MAX_LISTED_TOKENS} of either"
        )
    return {"allowed_token_ids": allowed}


def _engine_input(header: Mapping[str, Any], items: Mapping[str, Any]) -> Any:
    """vLLM's input for a request. It refers to images and videos that are not in `items` by their hash."""
    from vllm.inputs import mm_input, tokens_input
    from vllm.multimodal.inputs import MultiModalKwargsItems

    if not header["items"]:
        return tokens_input(prompt_token_ids=header["token_ids"])
    kinds: dict[str, list[list[Any]]] = {}
    for item in header["items"]:
        if isinstance(items.get(item[0]), ValueError):
            raise items[item[0]]
        kinds.setdefault(item[4], []).append(item)
    return mm_input(
        prompt_token_ids=header["token_ids"],
        mm_kwargs=MultiModalKwargsItems(
            {kind: [items.get(hash) for hash, *_ in shown] for kind, shown in kinds.items()}
        ),
        mm_hashes={kind: [hash for hash, *_ in shown] for kind, shown in kinds.items()},
        mm_placeholders={kind: [place_of(*each) for each in shown] for kind, shown in kinds.items()},
    )


def place_of(hash: str, offset: int, length: int, gaps: list[list[int]], kind: str, lead: int) -> Any:
    """vLLM's place of an image or a video, with marks of the tokens that get its features where others stand between
    them, or `lead` tokens before them."""
    import torch
    from vllm.multimodal.inputs import PlaceholderRange

    if not gaps and not lead:
        return PlaceholderRange(offset, length)
    marks = torch.ones(lead + length, dtype=torch.bool)
    marks[:lead] = False
    for start, count in gaps:
        marks[lead + start : lead + start + count] = False
    return PlaceholderRange(offset - lead, lead + length, is_embed=marks)


def _span(span: Any) -> tuple[str, int, int]:
    """vLLM's span of tokens with one weight version → (version, first token, end)."""
    if isinstance(span, dict):
        return span["version"], span["start"], span["end"]
    return span.version, span.start, span.end


async def _read(receive: Receive) -> bytes | None:
    """The body of a request; None if the client has disconnected before its end."""
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


async def _stream_frames(send: Send, frames: asyncio.Queue[bytes | BaseException | None], count: int) -> None:
    """Send a response with `count` frames as they come. Return early at None, raise an exception."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    while count:
        ready = [await frames.get()]
        while not frames.empty():
            ready.append(frames.get_nowait())
        body = []
        for frame in ready:
            if frame is None:
                return
            if isinstance(frame, BaseException):
                raise frame
            body.append(frame)
        count -= len(body)
        await send({"type": "http.response.body", "body": b"".join(body), "more_body": count > 0})


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _respond(send: Send, body: bytes, status: int = 200) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})
