"""The HTTP client of one vLLM server: completions, with each image's data sent once, and the calls of the weight sync.

    generate ─▶ send the data of images that the server lacks
             ─▶ send the request, with images by hash alone
             ─▶ if the server has forgotten one (its cache is bounded): send the request again with the data of all

Requests with the same new image wait until the first of them has sent its data. A server that the run has started takes
image data without a request, and requests in batches (batches.py). Another server takes data only as part of a request,
and only an answer shows that it holds the images. There the client sends the prompt up to the last new image and
samples one token. This is not wasted work: it computes the prefix that the siblings of the group share.

A request for a completion has no deadline of its own. It waits as long as the server makes progress (`control`,
`progress`).
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import httpx

from vlmrl.caches.lru import ByteLRU
from vlmrl.config.model import Dtype
from vlmrl.errors import EngineError
from vlmrl.inference.vllm import old_vllm
from vlmrl.inference.vllm.batches import CONTENT_TYPE, Batcher, BatchLostError
from vlmrl.inference.vllm.control import ControlClient, ServerLostError, complaint
from vlmrl.inference.vllm.frames import FORGOTTEN, ROUTE, pack_batch, request_header
from vlmrl.inference.vllm.image_fields import ImageFields
from vlmrl.inference.vllm.wire import (
    MAX_LISTED_TOKENS,
    Answer,
    WireError,
    data_size,
    encode_image,
    parse_answer,
    request_body,
)
from vlmrl.types import ImageItem, Prompt, SamplingParams

log = logging.getLogger(__name__)

ENCODED_LIMIT_BYTES = 256 * 1024**2
"""Limit on the encoded images that are kept for the next server, or for one that has forgotten them."""


class ImageEncoder:
    """Encodes images for servers, and keeps the most recent results, up to `ENCODED_LIMIT_BYTES`."""

    def __init__(self, dtype: Dtype) -> None:
        """`dtype` as for `wire.encode_image`."""
        self.dtype = dtype
        self._kept: ByteLRU[tuple[str, ImageFields], bytes] = ByteLRU(ENCODED_LIMIT_BYTES, keep_newest=True)
        self._logged: set[str] = set()

    async def encode(self, images: Collection[ImageItem], fields: ImageFields) -> dict[str, bytes]:
        """Hash → output of `encode_image`, for the distinct images. Runs in a thread: an image takes milliseconds."""
        distinct = {image.hash: image for image in images}
        kept = {hash: self._kept.get((hash, fields)) for hash in distinct}
        encoded = {hash: data for hash, data in kept.items() if data is not None}
        missing = [image for image in distinct.values() if image.hash not in encoded]
        if missing:
            self._log_form("tensors" if fields.are_tensors_of(missing[0]) else "pictures with digests")
            made = await asyncio.to_thread(
                lambda: {image.hash: encode_image(image, self.dtype, fields) for image in missing}
            )
            for hash, data in made.items():
                self._kept.put((hash, fields), data, len(data))
            encoded |= made
        return encoded

    def _log_form(self, form: str) -> None:
        if form not in self._logged:
            self._logged.add(form)
            log.info("images go to the servers as %s", form)


class VllmClient(ControlClient):
    """The client of one launch of one server; a restarted server gets a new client. Belongs to one event loop."""

    def __init__(
        self,
        name: str,
        url: str,
        api_key: str | None,
        encoder: ImageEncoder,
        counts: Counter[str],
        request_timeout_s: float,
        transport: httpx.AsyncBaseTransport | None = None,
        unix_socket: Path | None = None,
    ) -> None:
        """The arguments are those of `ControlClient`."""
        super().__init__(name, url, api_key, counts, request_timeout_s, transport, unix_socket)
        self.keeps_images = False
        """Whether the server takes an image by its hash alone; set by `settings.check_settings`."""
        self.has_route = False
        """Whether the server has the run's own endpoint (`frames.ROUTE`); set by `settings.check_settings`."""
        self.image_fields: ImageFields | None = None
        """What the server's items of images consist of, None for a text model; set by `settings.check_settings`."""
        self._encoder = encoder
        self._generating = 0
        self._numbers = itertools.count()
        self._held: set[str] = set()
        """Hashes of the images whose data the server has received."""
        self._sending: dict[str, asyncio.Event] = {}
        """Hashes of the images whose data is being sent; the event is set when it has arrived or was lost."""
        self._batcher = Batcher(self._http, counts)

    @property
    def is_generating(self) -> bool:
        """Whether a completion is requested from the server at this moment."""
        return self._generating > 0

    async def generate(self, rollout_id: str, prompt: Prompt, sampling: SamplingParams) -> Answer:
        """Sample one completion. Raises `ServerLostError` and `EngineError`."""
        # The engine would die of another one, and never answer: its own message format has 64 bits for it.
        assert isinstance(sampling.seed, int), f"seed {sampling.seed!r} is not an int"
        assert 0 <= sampling.seed < 2**64, f"seed {sampling.seed} does not fit into 64 bits"
        if prompt.images:
            self._check_takes(rollout_id, prompt)
        self._generating += 1
        try:
            return await self._generate(rollout_id, prompt, sampling)
        finally:
            self._generating -= 1

    def _check_takes(self, rollout_id: str, prompt: Prompt) -> None:
        """Raise `EngineError` for images that this server would not compute with exactly."""
        fields = self.image_fields
        if fields is None:
            raise EngineError(
                f"rollout {rollout_id}: {self.name} takes no images: start it without --limit-mm-per-prompt and with "
                "the checkpoint of model.name"
            )
        # vLLM's own endpoint takes tensors only. It has no marks of image tokens either, and dies of the wrong count.
        has_gaps = any(placeholder.gaps for placeholder in prompt.placeholders)
        if not self.has_route and (has_gaps or not all(map(fields.are_tensors_of, prompt.images))):
            raise EngineError(
                f"rollout {rollout_id}: vLLM's own endpoint cannot express the images of this model family exactly, "
                f"and {self.name} has no other: set inference.urls=[], so that the run starts servers itself"
            )

    async def _generate(self, rollout_id: str, prompt: Prompt, sampling: SamplingParams) -> Answer:
        answer = None
        if not prompt.images or (self.keeps_images and await self._send_new_images(rollout_id, prompt, sampling)):
            answer = await self._request(rollout_id, prompt, {}, sampling)
        if answer is None:
            if self.keeps_images:
                self._counts["wire/images_forgotten"] += 1
                self._held.difference_update(image.hash for image in prompt.images)
            answer = await self._request(rollout_id, prompt, await self._encode(prompt.images), sampling)
            assert answer is not None, "a request with the data of all images needs no image from the server's cache"
            if self.keeps_images:
                self._held.update(image.hash for image in prompt.images)
        return answer

    async def _send_new_images(self, rollout_id: str, prompt: Prompt, sampling: SamplingParams) -> bool:
        """Send the images of the prompt that the server lacks; False if it has forgotten one in the meantime."""
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
            # No await between finding the new images and claiming them, so no other request claims the same ones. And
            # this request holds no claim while it waits for another, so requests cannot deadlock.
            arrived = asyncio.Event()
            self._sending.update(dict.fromkeys(new, arrived))
            try:
                data = await self._encode(new.values())
                if self.has_route:
                    await self._send_images(rollout_id, data)
                else:
                    last = prompt.placeholders[shown - 1]
                    end = last.offset + last.length
                    prefix = Prompt(prompt.token_ids[:end], prompt.placeholders[:shown], prompt.images[:shown])
                    one_token = replace(sampling, max_new_tokens=1, temperature=0.0)
                    if await self._request(rollout_id, prefix, data, one_token) is None:
                        return False
                self._held.update(new)
            finally:
                for hash in new:
                    del self._sending[hash]
                arrived.set()

    async def _encode(self, images: Collection[ImageItem]) -> dict[str, bytes]:
        assert self.image_fields is not None, "checked by `_check_takes`"
        return await self._encoder.encode(images, self.image_fields)

    async def _send_images(self, rollout_id: str, data: Mapping[str, bytes]) -> None:
        """Send the data of images, by hash; the server keeps it until a request refers to the image."""
        body = await asyncio.to_thread(pack_batch, (), data)
        self._counts["wire/bytes_sent"] += len(body)
        self._counts["wire/images_sent"] += len(data)
        response = await self._send("POST", ROUTE, content=body, headers=CONTENT_TYPE)
        if response.status_code != 200:
            await self._raise_if_dying(response.status_code, complaint(response))
            raise EngineError(f"rollout {rollout_id}: {self.name} refused the images with {complaint(response)}")

    async def _request(
        self, rollout_id: str, prompt: Prompt, data: Mapping[str, bytes], sampling: SamplingParams
    ) -> Answer | None:
        """Send one request with `data`, the other images by hash → the answer; None if the server lacks an image."""
        by_hash = [image for image in prompt.images if image.hash not in data]
        fields = self.image_fields
        saved = 0 if fields is None else sum(data_size(image, self._encoder.dtype, fields) for image in by_hash)
        self._counts["wire/bytes_saved"] += saved if self.has_route else saved * 4 // 3  # base64
        self._counts["wire/images_sent"] += len(data)
        self._counts["inference/requests"] += 1
        request_id = f"{rollout_id}/{next(self._numbers)}"
        try:
            send = self._send_in_batch if self.has_route else self._send_alone
            answer = await send(rollout_id, request_id, prompt, data, sampling, has_hashes=bool(by_hash))
        except WireError as error:
            raise EngineError(f"rollout {rollout_id}: {self.name} returned a malformed answer: {error}") from error
        if answer is None:
            return None
        if answer.finish_reason == "abort":
            raise ServerLostError(f"{self.name} dropped the request")
        if old_vllm.has_forgotten_image(len(answer.token_ids), has_hashes=bool(by_hash)):
            return None
        if not len(answer.token_ids):
            raise EngineError(f"rollout {rollout_id}: {self.name} returned a completion without tokens")
        return answer

    async def _send_in_batch(
        self,
        rollout_id: str,
        request_id: str,
        prompt: Prompt,
        data: Mapping[str, bytes],
        sampling: SamplingParams,
        *,
        has_hashes: bool,
    ) -> Answer | None:
        """Use the run's own endpoint, in a batch with the other requests of this turn of the event loop."""
        header = request_header(request_id, prompt.token_ids, prompt.placeholders, sampling, is_whole=not has_hashes)
        try:
            async with self._unless_given_up():
                response = await self._batcher.send(header, data)
        except BatchLostError as error:
            raise ServerLostError(f"{self.name}: {error}") from error
        if response.status == FORGOTTEN:
            return None
        if response.status != 200:
            await self._raise_if_dying(response.status, response.complaint)
            raise EngineError(f"rollout {rollout_id}: {self.name} answered with {response.complaint}")
        return response.answer()

    async def _send_alone(
        self,
        rollout_id: str,
        request_id: str,
        prompt: Prompt,
        data: Mapping[str, bytes],
        sampling: SamplingParams,
        *,
        has_hashes: bool,
    ) -> Answer | None:
        """Use vLLM's own endpoint."""
        banned = len(sampling.banned_token_ids)
        if banned > MAX_LISTED_TOKENS:
            raise EngineError(
                f"rollout {rollout_id}: {self.name} takes at most {MAX_LISTED_TOKENS} banned tokens, but {banned} "
                "tokens of the vocabulary are not the tokenizer's: set inference.urls=[], so that the run starts "
                "servers itself"
            )
        arguments = (request_id, prompt.token_ids, prompt.placeholders, data, sampling)
        # Joining megabytes would block the event loop.
        body = await asyncio.to_thread(request_body, *arguments) if data else request_body(*arguments)
        self._counts["wire/bytes_sent"] += len(body)
        response = await self._send(
            "POST",
            "/inference/v1/generate",
            content=body,
            headers={"content-type": "application/json"},
        )
        if response.status_code == 500:
            await self._raise_if_dying(500, complaint(response))
            if has_hashes:
                return None  # the server lacks an image: vLLM reports this as a plain error 500
        if response.status_code != 200:
            raise EngineError(f"rollout {rollout_id}: {self.name} answered with {complaint(response)}")
        return parse_answer(response.content)
