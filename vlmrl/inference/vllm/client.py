"""The HTTP client of one vLLM server: completions, with the data of each image and video sent once, and the calls of
the weight sync.

    generate ─▶ send the data of images that the server lacks
             ─▶ send the request, with images by hash alone
             ─▶ if the server has forgotten one (its cache is bounded): send the request again with the data of all

A server without the run's own endpoint gets the images of some model families as pictures (content_parts.py).

Requests with the same new image wait until the first of them has sent its data. A server that the run has started takes
image data without a request, and requests in batches (batches.py). Another server takes data only as part of a request,
and only an answer shows that it holds the images. There the client sends the prompt up to the last new image and
samples one token. This is not wasted work: it computes the prefix that the siblings of the group share.

A request for a completion has no deadline of its own. It waits as long as the server makes progress (`control`,
`progress`).
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import logging
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import httpx

from vlmrl.errors import EngineError
from vlmrl.inference.vllm import old_vllm
from vlmrl.inference.vllm.batches import CONTENT_TYPE, Batcher, BatchLostError
from vlmrl.inference.vllm.content_parts import Written, difference, end_of, unexpanded
from vlmrl.inference.vllm.control import ControlClient, ServerLostError, complaint
from vlmrl.inference.vllm.frames import FORGOTTEN, ROUTE, pack_batch, request_header
from vlmrl.inference.vllm.image_fields import ImageFields
from vlmrl.inference.vllm.item_encoder import ItemEncoder
from vlmrl.inference.vllm.prefetched import Prefetched
from vlmrl.inference.vllm.wire import (
    MAX_LISTED_TOKENS,
    Answer,
    WireError,
    data_size,
    encode_picture,
    parse_answer,
    picture_request_body,
    request_body,
)
from vlmrl.types import ImageItem, MMItem, Modality, Prompt, SamplingParams

log = logging.getLogger(__name__)

ENDPOINT = "/inference/v1/generate"
"""vLLM's own endpoint."""

ROUTE_FLAG = "--middleware vlmrl.inference.vllm.in_server.route.Route"
"""Adds the run's own endpoint to a server that the run has not started."""


class VllmClient(ControlClient):
    """The client of one launch of one server; a restarted server gets a new client. Belongs to one event loop."""

    def __init__(
        self,
        name: str,
        url: str,
        api_key: str | None,
        encoder: ItemEncoder,
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
        self.video_fields: ImageFields | None = None
        """What the server's items of videos consist of; None before the first prompt with a video."""
        self._encoder = encoder
        self._generating = 0
        self._numbers = itertools.count()
        self._held: set[str] = set()
        """Hashes of the images and videos whose data the server has received."""
        self._sending: dict[str, asyncio.Event] = {}
        """Hashes of those whose data is being sent; the event is set when it has arrived or was lost."""
        self._prefetched = Prefetched()
        self._batcher = Batcher(self._http, counts)
        self._written: dict[str, Written] = {}
        """Hash of each image that goes as a picture → what the server writes for it. Its tensors were compared."""
        self._comparing = asyncio.Lock()

    @property
    def is_generating(self) -> bool:
        """Whether a completion is requested from the server at this moment."""
        return self._generating > 0

    async def generate(self, rollout_id: str, prompt: Prompt, sampling: SamplingParams) -> Answer:
        """Sample one completion. Raises `ServerLostError` and `EngineError`."""
        # The engine would die of another one, and never answer: its own message format has 64 bits for it.
        assert isinstance(sampling.seed, int), f"seed {sampling.seed!r} is not an int"
        assert 0 <= sampling.seed < 2**64, f"seed {sampling.seed} does not fit into 64 bits"
        if prompt.mm_items:
            self._check_takes(rollout_id)
        if prompt.videos:
            await self._check_videos(rollout_id, prompt)
        self._generating += 1
        try:
            return await self._generate(rollout_id, prompt, sampling)
        finally:
            self._generating -= 1

    async def prefetch(self, prompt: Prompt) -> None:
        """Send the images and videos of a later request that the server lacks, if `Prefetched` has room for them. Does
        nothing for a server without the run's own endpoint. Raises `ServerLostError` and `EngineError`."""
        if not (self.has_route and self.keeps_images) or not prompt.mm_items:
            return
        self._check_takes("ahead")
        if prompt.videos:
            await self._check_videos("ahead", prompt)
        new = {item.hash: self._size_of(item) for item in prompt.mm_items if item.hash not in self._held}
        if self._prefetched.take(new):
            await self._send_new_images("ahead", prompt, None)

    def _size_of(self, item: MMItem) -> int:
        fields = self._fields_of(item.modality)
        assert fields is not None, "the server takes such items"
        return data_size(item, self._encoder.dtype, fields)

    def _check_takes(self, rollout_id: str) -> None:
        """Raise `EngineError` where the server takes no images."""
        if self.image_fields is None:
            raise EngineError(
                f"rollout {rollout_id}: {self.name} takes no images: start it without --limit-mm-per-prompt and with "
                "the checkpoint of model.name"
            )

    async def _check_videos(self, rollout_id: str, prompt: Prompt) -> None:
        """Raise `EngineError` where the server takes no videos, or not these."""
        async with self._comparing:
            if self.video_fields is None:
                (found, *_) = await self.call_workers("vlmrl_video_fields")
                if "error" in found:
                    raise EngineError(
                        f"rollout {rollout_id}: {self.name} takes no videos, because {found['error']}: set "
                        "inference=embedded, or show the frames as images"
                    )
                self.video_fields = ImageFields.of(found)
        fields = self.video_fields
        if not all(map(fields.are_tensors_of, prompt.videos)):
            theirs, ours = ", ".join(field.name for field in fields.fields), ", ".join(prompt.videos[0].mm_kwargs)
            raise EngineError(
                f"rollout {rollout_id}: vLLM makes a video of other tensors ({theirs}) than the renderer ({ours}), so "
                f"{self.name} would see another video: set inference=embedded"
            )
        if not self.has_route and (fields.has_lead or self._takes_pictures(prompt)):
            raise EngineError(
                f"rollout {rollout_id}: {self.name} cannot be told which tokens of the prompt are those of a video: "
                f"start it with {ROUTE_FLAG}, or set inference.urls=[], so that the run starts servers itself"
            )

    def _fields_of(self, kind: Modality) -> ImageFields | None:
        return self.image_fields if kind == "image" else self.video_fields

    def _takes_pictures(self, prompt: Prompt) -> bool:
        """Whether the prompt's images go as pictures. vLLM's own endpoint takes tensors only as its items have them,
        and has no marks of image tokens: it would die of gaps between them."""
        fields = self.image_fields
        if self.has_route or fields is None:
            return False
        has_gaps = any(placeholder.gaps for placeholder in prompt.placeholders if placeholder.modality == "image")
        return has_gaps or not all(map(fields.are_tensors_of, prompt.images))

    async def _generate(self, rollout_id: str, prompt: Prompt, sampling: SamplingParams) -> Answer:
        answer = None
        self._prefetched.use(item.hash for item in prompt.mm_items)
        if self._takes_pictures(prompt):
            await self._compare_pictures(rollout_id, prompt.images)
        if not prompt.mm_items or (self.keeps_images and await self._send_new_images(rollout_id, prompt, sampling)):
            answer = await self._request(rollout_id, prompt, {}, sampling)
        if answer is None:
            if self.keeps_images:
                self._counts["wire/images_forgotten"] += 1
                self._held.difference_update(item.hash for item in prompt.mm_items)
            data = await self._encode(prompt, prompt.mm_items)
            answer = await self._request(rollout_id, prompt, data, sampling)
            assert answer is not None, "a request with the data of all its items needs none from the server's cache"
            if self.keeps_images:
                self._held.update(item.hash for item in prompt.mm_items)
        return answer

    async def _send_new_images(self, rollout_id: str, prompt: Prompt, sampling: SamplingParams | None) -> bool:
        """Send the images and videos of the prompt that the server lacks; False if it has forgotten one in the
        meantime. `sampling` is needed where data goes with a request only."""
        while True:
            new: dict[str, MMItem] = {}
            shown = 0
            for place, item in enumerate(prompt.mm_items, 1):
                if item.hash in self._sending:
                    break
                if item.hash not in self._held and item.hash not in new:
                    new[item.hash] = item
                    shown = place
            else:
                if not new:
                    return True
            if not new:
                await self._sending[prompt.mm_items[place - 1].hash].wait()
                continue
            # No await between finding the new items and claiming them, so no other request claims the same ones. And
            # this request holds no claim while it waits for another, so requests cannot deadlock.
            arrived = asyncio.Event()
            self._sending.update(dict.fromkeys(new, arrived))
            try:
                data = await self._encode(prompt, new.values())
                if self.has_route:
                    await self._send_images(rollout_id, data)
                else:
                    assert sampling is not None, "without the run's own endpoint nothing is sent ahead"
                    last = prompt.placeholders[shown - 1]
                    end = last.offset + last.length
                    if self._takes_pictures(prompt):
                        end = end_of(last, self._written[last.hash])
                    prefix = Prompt(prompt.token_ids[:end], prompt.placeholders[:shown], prompt.mm_items[:shown])
                    one_token = replace(sampling, max_new_tokens=1, temperature=0.0, stop=(), reports_support=False)
                    if await self._request(rollout_id, prefix, data, one_token) is None:
                        return False
                self._held.update(new)
            finally:
                for hash in new:
                    del self._sending[hash]
                arrived.set()

    async def _encode(self, prompt: Prompt, items: Collection[MMItem]) -> dict[str, bytes]:
        images = [item for item in items if item.modality == "image"]
        encoded = await self._encoder.encode(images, None if self._takes_pictures(prompt) else self.image_fields)
        if len(images) < len(items):
            videos = [item for item in items if item.modality == "video"]
            encoded |= await self._encoder.encode(videos, self.video_fields)
        return encoded

    async def _compare_pictures(self, rollout_id: str, images: Collection[ImageItem]) -> None:
        """Have the server's worker make each new image from its picture, and compare it with the renderer's."""
        async with self._comparing:
            new = {image.hash: image for image in images if image.hash not in self._written}
            if not new:
                return
            documents = await asyncio.to_thread(
                lambda: {
                    hash: base64.b64encode(encode_picture(image, self._encoder.dtype)).decode()
                    for hash, image in new.items()
                }
            )
            (found, *_) = await self.call_workers("vlmrl_compare_images", documents=documents)
            for hash, reported in found.items():
                if "error" in reported:
                    raise EngineError(
                        f"rollout {rollout_id}: {self.name} makes another image of {hash}: {reported['error']}. Start "
                        f"it with {ROUTE_FLAG}, or set inference.urls=[], so that the run starts servers itself"
                    )
                self._written[hash] = Written.of(reported)

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
        by_hash = [item for item in prompt.mm_items if item.hash not in data]
        fields = [(item, self._fields_of(item.modality)) for item in by_hash]
        saved = sum(data_size(item, self._encoder.dtype, known) for item, known in fields if known is not None)
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
        kinds: tuple[Modality, ...] = ("image", "video")
        leads = [kind for kind in kinds if (fields := self._fields_of(kind)) is not None and fields.has_lead]
        header = request_header(
            request_id, prompt.token_ids, prompt.placeholders, sampling, is_whole=not has_hashes, leads=leads
        )
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
        if sampling.reports_support:
            raise EngineError(
                f"rollout {rollout_id}: {self.name} does not report from which tokens it samples: start it with "
                f"{ROUTE_FLAG}, or set inference.urls=[], so that the run starts servers itself"
            )
        takes_pictures = self._takes_pictures(prompt)
        if takes_pictures:
            hashes = [placeholder.hash for placeholder in prompt.placeholders]
            make = partial(
                picture_request_body, request_id, self._unexpanded(rollout_id, prompt), hashes, data, sampling
            )
        else:
            make = partial(request_body, request_id, prompt.token_ids, prompt.placeholders, data, sampling)
        # Joining megabytes would block the event loop.
        body = await asyncio.to_thread(make) if data else make()
        self._counts["wire/bytes_sent"] += len(body)
        response = await self._send("POST", ENDPOINT, content=body, headers={"content-type": "application/json"})
        if response.status_code >= 500:
            await self._raise_if_dying(response.status_code, complaint(response))
        if has_hashes and (response.status_code == 500 or (takes_pictures and response.status_code == 400)):
            return None  # the server lacks an image: vLLM reports this as a plain error 500, or 400 for a picture
        if response.status_code != 200:
            raise EngineError(f"rollout {rollout_id}: {self.name} answered with {complaint(response)}")
        answer = parse_answer(response.content)
        if takes_pictures and (found := difference(prompt.token_ids, answer.prompt_token_ids)):
            raise EngineError(
                f"rollout {rollout_id}: {self.name} did not sample from the renderer's prompt: {found}. Start it with "
                f"{ROUTE_FLAG}, or set inference.urls=[], so that the run starts servers itself"
            )
        return answer

    def _unexpanded(self, rollout_id: str, prompt: Prompt) -> list[int]:
        try:
            return unexpanded(prompt.token_ids, prompt.placeholders, self._written)
        except ValueError as error:
            raise EngineError(
                f"rollout {rollout_id}: {self.name} would write another prompt than the renderer: {error}. Start it "
                f"with {ROUTE_FLAG}, or set inference.urls=[], so that the run starts servers itself"
            ) from error
