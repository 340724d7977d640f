"""HTTP to one vLLM server: a completion for a prompt, each image's data sent once, and the calls of the weight sync.

    generate ─▶ images that the server lacks: their data
             ─▶ the request itself, images by hash alone
             ─▶ the server has forgotten one (its cache is bounded): the same request with the data of all

Requests that show the same new image at the same time wait for whoever sends it. A server of the run takes data by
itself, and requests in batches (vllm_batches.py). Another's takes data with a request only, and its answer is the only
sign that it holds them: there, data goes with the prompt up to it, for one token. That is no waste: it computes the
prefix that the siblings of the group share.

What goes wrong is told apart by what helps: `ServerLostError` (the connection broke, the server is dying: ask again
when it or another is there) and `EngineError` (an answer, or none in time, that asking again would not change).
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import httpx
import orjson

from vlmrl.caches.lru import ByteLRU
from vlmrl.config.model import Dtype
from vlmrl.errors import EngineError
from vlmrl.inference.vllm.batches import CONTENT_TYPE, Batches, BatchLostError
from vlmrl.inference.vllm.connections import Connections
from vlmrl.inference.vllm.frames import FORGOTTEN, ROUTE, pack_batch, request_header
from vlmrl.inference.vllm.wire import (
    MOST_TOKENS,
    Answer,
    WireError,
    data_size,
    encode_image,
    parse_answer,
    request_body,
)
from vlmrl.types import ImageItem, Prompt, SamplingParams

ENCODED_LIMIT_BYTES = 256 * 1024**2
"""Encoded images kept for the next server, or for one that has forgotten."""

KEEPALIVE_S = 2.0
"""Seconds that an idle connection is kept. Less than the server's five: a connection that the server is closing just
then would lose a request."""

HEALTH_TIMEOUT_S = 5.0


class ServerLostError(Exception):
    """The server dropped the request or is dying; another, or the next one in its place, can answer it."""


class ImageEncoder:
    """Images as they go over the wire; the newest are kept, up to `ENCODED_LIMIT_BYTES`."""

    def __init__(self, dtype: Dtype, flat: Collection[str]) -> None:
        self.dtype = dtype
        self._flat = flat
        self._kept: ByteLRU[str, bytes] = ByteLRU(ENCODED_LIMIT_BYTES, keep_newest=True)

    async def encode(self, images: Collection[ImageItem]) -> dict[str, bytes]:
        """Hash → `encode_image` of it, of the distinct images; in a thread, for it takes milliseconds each."""
        distinct = {image.hash: image for image in images}
        kept = {hash: self._kept.get(hash) for hash in distinct}
        encoded = {hash: data for hash, data in kept.items() if data is not None}
        missing = [image for image in distinct.values() if image.hash not in encoded]
        if missing:
            made = await asyncio.to_thread(
                lambda: {image.hash: encode_image(image, self.dtype, self._flat) for image in missing}
            )
            for hash, data in made.items():
                self._kept.put(hash, data, len(data))
            encoded |= made
        return encoded


class VllmClient:
    """One life of one server: a server that was started again is another client's. Belongs to one event loop."""

    def __init__(
        self,
        name: str,
        url: str,
        api_key: str | None,
        encoder: ImageEncoder,
        counts: Counter[str],
        request_timeout_s: float,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """`counts` are the engine's, by metric; `transport` is a test's stand-in for the network."""
        self.name = name
        self.url = url
        self.keeps_images = False
        """Whether the server takes an image by its hash alone; set by whoever has asked for its settings."""
        self.has_route = False
        """Whether it has the run's own route, beside vLLM's; set as `keeps_images`."""
        self._encoder = encoder
        self._counts = counts
        self._timeout_s = request_timeout_s
        self._numbers = itertools.count()
        self._held: set[str] = set()
        """Hashes whose data the server has had in this life."""
        self._sending: dict[str, asyncio.Event] = {}
        """Hashes whose data is on its way; the event is set when it has arrived or was lost."""
        self._http = httpx.AsyncClient(
            base_url=url,
            headers={"authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx.Timeout(None, connect=request_timeout_s),
            trust_env=False,  # no proxy between a run and its servers
            transport=transport or Connections(KEEPALIVE_S),
        )
        self._batches = Batches(self._http, counts)

    async def close(self) -> None:
        await self._http.aclose()

    async def is_healthy(self) -> bool:
        """Whether the server answers and its engine lives."""
        try:
            return (await self._http.get("/health", timeout=HEALTH_TIMEOUT_S)).status_code == 200
        except httpx.TransportError:
            return False

    async def call(self, method: str, path: str, *, optional: bool = False, **arguments: Any) -> Any:
        """A control endpoint's JSON; `arguments` are httpx's `json` and `params`.

        None where an `optional` endpoint does not exist. Raises `ServerLostError`, and `EngineError` for any answer but
        success.
        """
        response = await self._send(f"{method} {path}", method, path, **arguments)
        if response.status_code == 404 and optional:
            return None
        if response.status_code != 200:
            await self._raise_if_dying(response.status_code, _complaint(response))
            raise EngineError(f"{self.name} answered {method} {path} with {_complaint(response)}")
        return orjson.loads(response.content) if response.content else {}

    async def call_workers(self, method: str, **arguments: Any) -> list[Any]:
        """What each worker's `method` returned."""
        answer = await self.call("POST", "/collective_rpc", json={"method": method, "kwargs": arguments})
        results: list[Any] = answer["results"]
        return results

    async def generate(self, rollout_id: str, prompt: Prompt, sampling: SamplingParams) -> Answer:
        """Sample one completion. Raises `ServerLostError` and `EngineError`."""
        answer = None
        if not prompt.images or (self.keeps_images and await self._introduce(rollout_id, prompt, sampling)):
            answer = await self._ask(rollout_id, prompt, {}, sampling)
        if answer is None:
            if self.keeps_images:
                self._counts["wire/images_forgotten"] += 1
                self._held.difference_update(image.hash for image in prompt.images)
            answer = await self._ask(rollout_id, prompt, await self._encoder.encode(prompt.images), sampling)
            assert answer is not None, "nothing was left to the server's memory"
            if self.keeps_images:
                self._held.update(image.hash for image in prompt.images)
        return answer

    async def _introduce(self, rollout_id: str, prompt: Prompt, sampling: SamplingParams) -> bool:
        """Have the server hold every image of the prompt; False where it has forgotten one on the way."""
        while True:
            new: dict[str, ImageItem] = {}
            shown = 0
            for place, image in enumerate(prompt.images, 1):
                if image.hash in self._sending:
                    break
                if image.hash not in self._held and image.hash not in new:
                    new[image.hash] = image
                    shown = place
            else:
                if not new:
                    return True
            if not new:
                await self._sending[prompt.images[place - 1].hash].wait()
                continue
            # Nothing is awaited between the look and the claim, and no claim is held while waiting for another's.
            arrived = asyncio.Event()
            self._sending.update(dict.fromkeys(new, arrived))
            try:
                data = await self._encoder.encode(new.values())
                if self.has_route:
                    await self._send_images(rollout_id, data)
                else:
                    last = prompt.placeholders[shown - 1]
                    end = last.offset + last.length
                    prefix = Prompt(prompt.token_ids[:end], prompt.placeholders[:shown], prompt.images[:shown])
                    one_token = replace(sampling, max_new_tokens=1, temperature=0.0)
                    if await self._ask(rollout_id, prefix, data, one_token) is None:
                        return False
                self._held.update(new)
            finally:
                for hash in new:
                    del self._sending[hash]
                arrived.set()

    async def _send_images(self, rollout_id: str, data: Mapping[str, bytes]) -> None:
        """Have the server keep `data` until a request shows the images."""
        body = await asyncio.to_thread(pack_batch, (), data)
        self._counts["wire/bytes_sent"] += len(body)
        self._counts["wire/images_sent"] += len(data)
        response = await self._send(f"rollout {rollout_id}", "POST", ROUTE, content=body, headers=CONTENT_TYPE)
        if response.status_code != 200:
            await self._raise_if_dying(response.status_code, _complaint(response))
            raise EngineError(f"rollout {rollout_id}: {self.name} answered images with {_complaint(response)}")

    async def _ask(
        self, rollout_id: str, prompt: Prompt, data: Mapping[str, bytes], sampling: SamplingParams
    ) -> Answer | None:
        """One request. None where the server does not hold an image that went by its hash."""
        by_hash = [image for image in prompt.images if image.hash not in data]
        saved = sum(data_size(image, self._encoder.dtype) for image in by_hash)
        self._counts["wire/bytes_saved"] += saved if self.has_route else saved * 4 // 3  # base64
        self._counts["wire/images_sent"] += len(data)
        self._counts["inference/requests"] += 1
        request_id = f"{rollout_id}/{next(self._numbers)}"
        try:
            ask = self._ask_in_batch if self.has_route else self._ask_alone
            answer = await ask(rollout_id, request_id, prompt, data, sampling, has_hashes=bool(by_hash))
        except WireError as error:
            raise EngineError(f"rollout {rollout_id}: {self.name} gave an answer that is none: {error}") from error
        if answer is None:
            return None
        if answer.finish_reason == "abort":
            raise ServerLostError(f"{self.name} dropped the request")
        if not len(answer.token_ids):
            if by_hash:
                return None  # so says 0.26
            raise EngineError(f"rollout {rollout_id}: {self.name} sampled nothing")
        return answer

    async def _ask_in_batch(
        self,
        rollout_id: str,
        request_id: str,
        prompt: Prompt,
        data: Mapping[str, bytes],
        sampling: SamplingParams,
        *,
        has_hashes: bool,
    ) -> Answer | None:
        """By the run's own route, with whatever else is asked at the time."""
        header = request_header(request_id, prompt.token_ids, prompt.placeholders, sampling, is_whole=not has_hashes)
        try:
            async with self._in_time(f"rollout {rollout_id}"):
                reply = await self._batches.ask(header, data)
        except BatchLostError as error:
            raise ServerLostError(f"{self.name}: {error}") from error
        if reply.status == FORGOTTEN:
            return None
        if reply.status != 200:
            await self._raise_if_dying(reply.status, reply.complaint)
            raise EngineError(f"rollout {rollout_id}: {self.name} answered with {reply.complaint}")
        return reply.answer()

    async def _ask_alone(
        self,
        rollout_id: str,
        request_id: str,
        prompt: Prompt,
        data: Mapping[str, bytes],
        sampling: SamplingParams,
        *,
        has_hashes: bool,
    ) -> Answer | None:
        """By vLLM's own route."""
        banned = len(sampling.banned_token_ids)
        if banned > MOST_TOKENS:
            raise EngineError(
                f"rollout {rollout_id}: {self.name} has room for {MOST_TOKENS} banned tokens, and the vocabulary has "
                f"{banned} that are not the tokenizer's: set inference.urls=[], so that the run starts servers itself"
            )
        arguments = (request_id, prompt.token_ids, prompt.placeholders, data, sampling)
        # Megabytes are not put together on the event loop.
        body = await asyncio.to_thread(request_body, *arguments) if data else request_body(*arguments)
        self._counts["wire/bytes_sent"] += len(body)
        response = await self._send(
            f"rollout {rollout_id}",
            "POST",
            "/inference/v1/generate",
            content=body,
            headers={"content-type": "application/json"},
        )
        if response.status_code == 500:
            await self._raise_if_dying(500, _complaint(response))
            if has_hashes:
                return None  # an image that it does not hold: vLLM says no more than that
        if response.status_code != 200:
            raise EngineError(f"rollout {rollout_id}: {self.name} answered with {_complaint(response)}")
        return parse_answer(response.content)

    async def _send(self, what: str, method: str, path: str, **arguments: Any) -> httpx.Response:
        try:
            async with self._in_time(what):
                return await self._http.request(method, path, **arguments)
        except httpx.TransportError as error:
            raise ServerLostError(f"{self.name}: {type(error).__name__} {error}") from error

    @asynccontextmanager
    async def _in_time(self, what: str) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self._timeout_s):
                yield
        except TimeoutError as error:
            self._counts["inference/timeouts"] += 1
            raise EngineError(
                f"{what}: {self.name} did not answer within inference.request_timeout_s={self._timeout_s:g}"
            ) from error

    async def _raise_if_dying(self, status: int, complaint: str) -> None:
        """A server whose engine has died answers once more before it ends."""
        if status >= 500 and not await self.is_healthy():
            raise ServerLostError(f"{self.name}: {complaint}")


def _complaint(response: httpx.Response) -> str:
    """The status and what vLLM says about it."""
    try:
        body = orjson.loads(response.content)
        error = body.get("error", body)
        text = str(error.get("message", error) if isinstance(error, dict) else error)
    except (orjson.JSONDecodeError, AttributeError):
        text = response.text
    return f"HTTP {response.status_code}: {text[:500]}"
