"""The run's own route in its vLLM servers: `POST /vlmrl/generate`, what `/inference/v1/generate` does, in batches.

    body ─▶ unpack_batch ─┬▶ images' data ─▶ kept until the first request that shows the image takes it to the engine
                          └▶ each request ─▶ AsyncLLM.add_request ─▶ tokens, logprobs, versions ─▶ pack_answer
    response begins when all of the batch are with the engine; then a frame per answer, as they come

vLLM's own route takes an HTTP request per completion and reads and writes JSON, through pydantic, on the event loop
that also hands out the engine's tokens. This one is a middleware, vLLM's own way to extend a server, and calls what the
other calls. Runs in vLLM's process and imports it there; servers of `inference.urls` may do without.

The engine takes requests in the order in which they are added and keeps the images of each, so the ones after may name
an image by its hash. Left out: everything that a rollout does not ask for (several samples, LoRA, stop strings).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from copy import copy
from functools import lru_cache
from typing import Any, TypeAlias

from vlmrl.caches.lru import ByteLRU
from vlmrl.inference.vllm.frames import FORGOTTEN, ROUTE, pack_answer, pack_error, unpack_batch
from vlmrl.inference.vllm.wire import BANNED_BIAS, MOST_TOKENS

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]

WAITING_LIMIT_BYTES = 1024**3
"""Of images' data that no request has taken yet; past it the oldest goes, as if the engine had forgotten it."""


class Route:
    """ASGI middleware; answers `ROUTE` itself and leaves everything else to `app`."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._app = app
        self._waiting = WaitingImages(WAITING_LIMIT_BYTES)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != ROUTE:
            return await self._app(scope, receive, send)
        if scope["method"] == "GET":  # is the route there?
            return await _respond(send, b"{}")
        body = await _read(receive)
        if body is None:
            return None
        batch = unpack_batch(body)
        engine = scope["app"].state.engine_client
        frames: asyncio.Queue[bytes | BaseException | None] = asyncio.Queue()
        """Answers; what ends the batch by an error; None when the client has left."""
        leaving = asyncio.ensure_future(_left(receive))
        leaving.add_done_callback(lambda _: frames.put_nowait(None))
        answering: list[asyncio.Task[None]] = []
        try:
            # Milliseconds each, which the event loop has better use for.
            items = await asyncio.to_thread(_decode, batch.documents) if batch.documents else {}
            if not batch.requests:
                self._waiting.add({hash: (item, len(batch.documents[hash])) for hash, item in items.items()})
                return await _respond(send, b"")
            for number, header in enumerate(batch.requests):
                shown = items if header["is_whole"] else self._waiting.take(header["images"])
                try:
                    outputs = await engine.add_request(
                        header["request_id"],
                        _engine_input(header, shown),
                        _sampling_params(header, engine.model_config.get_vocab_size()),
                    )
                except Exception as error:  # ValueError in 0.26, vLLM's own in 0.32
                    if engine.errored:
                        raise
                    frames.put_nowait(pack_error(number, 400, str(error)))
                    continue
                answering.append(asyncio.create_task(_answer(engine, number, header, outputs, frames)))
                await asyncio.sleep(0)  # images that arrive meanwhile are read
            await send({"type": "http.response.start", "status": 200, "headers": []})
            left = len(batch.requests)
            while left:
                ready = [await frames.get()]
                while not frames.empty():
                    ready.append(frames.get_nowait())
                whole = []
                for frame in ready:
                    if frame is None:
                        return None
                    if isinstance(frame, BaseException):
                        raise frame
                    whole.append(frame)
                left -= len(whole)
                await send({"type": "http.response.body", "body": b"".join(whole), "more_body": left > 0})
        finally:
            leaving.cancel()
            for task in answering:
                task.cancel()  # the engine drops what nobody waits for
        return None


class WaitingImages:
    """Images on their way to the engine.

    >>> waiting = WaitingImages(limit_bytes=5)
    >>> waiting.add({"a": ("A", 3), "b": ("B", 2), "c": ("C", 1)})
    >>> waiting.take([["b", 0, 1], ["c", 1, 1], ["a", 2, 1]]), waiting.take([["b", 0, 1]])
    ({'b': 'B', 'c': 'C'}, {})
    """

    def __init__(self, limit_bytes: int) -> None:
        self._items: ByteLRU[str, Any] = ByteLRU(limit_bytes)

    def add(self, items: Mapping[str, tuple[Any, int]]) -> None:
        """Hash → the image as vLLM takes it, and its size in bytes."""
        for hash, (item, num_bytes) in items.items():
            self._items.put(hash, item, num_bytes)

    def take(self, images: list[list[Any]]) -> dict[str, Any]:
        """Those of `images` ([hash, offset, length] each) that wait; they do not any more."""
        hashes = dict.fromkeys(hash for hash, _, _ in images)
        return {hash: self._items.pop(hash) for hash in hashes if hash in self._items}


def _decode(documents: Mapping[str, memoryview]) -> dict[str, Any]:
    """Hash → vLLM's `MultiModalKwargsItem`, made of what `vllm_wire.encode_image` wrote."""
    from vllm.multimodal.inputs import MultiModalKwargsItem
    from vllm.v1.serial_utils import MsgpackDecoder

    decoder = MsgpackDecoder(t=MultiModalKwargsItem)
    return {hash: decoder.decode(document) for hash, document in documents.items()}


async def _answer(
    engine: Any,
    number: int,
    header: Mapping[str, Any],
    outputs: Any,
    frames: asyncio.Queue[bytes | BaseException | None],
) -> None:
    """Wait for what vLLM puts into `outputs` and put it into `frames`."""
    try:
        frames.put_nowait(await _frame(engine, number, header, outputs))
    except asyncio.CancelledError:
        await engine.abort(outputs.request_id, internal=True)
        raise
    except Exception as error:  # noqa: BLE001 — raised again where the response is written
        frames.put_nowait(error)


async def _frame(engine: Any, number: int, header: Mapping[str, Any], outputs: Any) -> bytes:
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        final = outputs.get_nowait() or await outputs.get()
        while not final.finished:
            final = outputs.get_nowait() or await outputs.get()
    except EngineDeadError:
        raise
    except ValueError as error:
        return pack_error(number, 400, str(error))
    except Exception as error:  # vLLM raises whatever its cache raised, wrapped
        if engine.errored:
            raise
        return pack_error(number, 500 if header["is_whole"] else FORGOTTEN, str(error))
    completion = final.outputs[0]
    tokens = list(completion.token_ids)
    if not tokens and completion.finish_reason != "abort" and not header["is_whole"]:
        return pack_error(number, FORGOTTEN, "no token")  # so says 0.26
    spans = getattr(completion, "weight_versions", None)  # 0.26 has none
    versions = None if spans is None else [_span(span) for span in spans]
    logprobs = completion.logprobs
    assert list(logprobs.token_ids) == tokens, "one logprob per token, its own"
    return pack_answer(number, tokens, logprobs.logprobs, versions, completion.finish_reason or "abort")


def _sampling_params(header: Mapping[str, Any], vocabulary: int) -> Any:
    stops, banned = tuple(header["stop_token_ids"]), tuple(map(tuple, header["banned"]))
    params = copy(_sampling(header["temperature"], header["max_tokens"], stops, banned, vocabulary))
    params.seed = header["seed"]
    return params


@lru_cache(maxsize=16)
def _sampling(
    temperature: float, max_tokens: int, stops: tuple[int, ...], banned: tuple[tuple[int, int], ...], vocabulary: int
) -> Any:
    """What a run's requests have in common. vLLM would copy the hundreds of banned tokens of each of them, in more time
    than all else takes."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=temperature,
        seed=0,  # each has its own
        max_tokens=max_tokens,
        stop_token_ids=list(stops),
        ignore_eos=True,
        logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        skip_clone=True,
        **_ban(banned, vocabulary),
    )


def _ban(banned: tuple[tuple[int, int], ...], vocabulary: int) -> dict[str, Any]:
    """Keep the tokens of all runs [first, end) from being sampled, in whichever way vLLM has room for.

    >>> _ban(((3, 5),), 8), _ban((), 8), _ban(((2, 5000),), 5001)
    ({'logit_bias': {3: -1e+30, 4: -1e+30}}, {}, {'allowed_token_ids': [0, 1, 5000]})
    """
    count = sum(end - first for first, end in banned)
    if count <= MOST_TOKENS:
        bias = {token: BANNED_BIAS for first, end in banned for token in range(first, end)}
        return {"logit_bias": bias} if bias else {}
    edges = [0, *(edge for run in banned for edge in run), vocabulary]
    allowed = [token for first, end in zip(edges[::2], edges[1::2], strict=True) for token in range(first, end)]
    if len(allowed) > MOST_TOKENS:
        raise ValueError(f"{count} tokens are banned and {len(allowed)} are not: vLLM takes {MOST_TOKENS} of either")
    return {"allowed_token_ids": allowed}


def _engine_input(header: Mapping[str, Any], items: Mapping[str, Any]) -> Any:
    """Images that `items` lacks go by their hash."""
    from vllm.inputs import mm_input, tokens_input
    from vllm.multimodal.inputs import MultiModalKwargsItems, PlaceholderRange

    images = header["images"]
    if not images:
        return tokens_input(prompt_token_ids=header["token_ids"])
    return mm_input(
        prompt_token_ids=header["token_ids"],
        mm_kwargs=MultiModalKwargsItems({"image": [items.get(hash) for hash, _, _ in images]}),
        mm_hashes={"image": [hash for hash, _, _ in images]},
        mm_placeholders={"image": [PlaceholderRange(offset, length) for _, offset, length in images]},
    )


def _span(span: Any) -> tuple[str, int, int]:
    if isinstance(span, dict):
        return span["version"], span["start"], span["end"]
    return span.version, span.start, span.end


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


async def _respond(send: Send, body: bytes) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})
