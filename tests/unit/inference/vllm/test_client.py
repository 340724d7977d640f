"""Requests of the client to a scripted server: each image's data once, and again after the server has forgotten it.

test_engine.py has the same with real servers.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any, TypeAlias

import httpx
import numpy as np
import orjson
import pytest

from support.image_fields import QWEN, QWEN2_VIDEOS, TILED
from vlmrl.config.model import Dtype
from vlmrl.errors import EngineError
from vlmrl.inference.vllm.client import VllmClient
from vlmrl.inference.vllm.control import ServerLostError
from vlmrl.inference.vllm.image_fields import ImageFields
from vlmrl.inference.vllm.item_encoder import ItemEncoder
from vlmrl.inference.vllm.wire import Answer
from vlmrl.types import ImageItem, Placeholder, Prompt, SamplingParams, VideoItem

SAMPLING = SamplingParams(max_new_tokens=2, temperature=1.0, stop_token_ids=(9,), banned_token_ids=(), seed=0)
HttpResponse: TypeAlias = httpx.Response
Handler: TypeAlias = Callable[[httpx.Request], Coroutine[None, None, HttpResponse]]


def sampled(*tokens: int, finish_reason: str = "stop") -> HttpResponse:
    content = [{"token_id": token, "logprob": -1.0} for token in tokens]
    choice = {"token_ids": tokens, "finish_reason": finish_reason, "logprobs": {"content": content}}
    return httpx.Response(200, json={"choices": [choice]})


class Server:
    """Caches the images that it receives, as vLLM does. `forgets` makes it empty the cache before the next request."""

    def __init__(self, forgotten: Callable[[], HttpResponse]) -> None:
        self.requests: list[list[tuple[str, bool]]] = []
        """Per request and image: the image's hash, and whether the request has its data."""
        self.held: set[str] = set()
        self.forgets = False
        self.arrived = asyncio.Event()
        self.go_on = asyncio.Event()
        self.go_on.set()
        self._forgotten = forgotten

    async def __call__(self, request: httpx.Request) -> HttpResponse:
        if request.url.path == "/health":
            return httpx.Response(200)
        features = orjson.loads(request.content).get("features")
        images = (
            [
                (hash, data is not None)
                for hash, data in zip(features["mm_hashes"]["image"], features["kwargs_data"]["image"], strict=True)
            ]
            if features
            else []
        )
        self.requests.append(images)
        self.arrived.set()
        await self.go_on.wait()
        if self.forgets:
            self.held.clear()
            self.forgets = False
        self.held.update(hash for hash, has_data in images if has_data)
        if any(hash not in self.held for hash, _ in images):
            return self._forgotten()
        return sampled(5, 9)


FORGOTTEN = [
    pytest.param(lambda: httpx.Response(500, json={"error": {"message": "Internal server error"}}), id="0.32"),
    pytest.param(lambda: sampled(), id="0.26"),
]


def client_of(handler: Handler, timeout_s: float = 60.0) -> VllmClient:
    encoder = ItemEncoder(Dtype.float32)
    client = VllmClient(
        "server", "http://server", "key", encoder, Counter(), timeout_s, transport=httpx.MockTransport(handler)
    )
    client.keeps_images = True
    client.image_fields = QWEN
    return client


def prompt(*hashes: str) -> Prompt:
    """One placeholder token per image, one token of text around each."""
    images = {
        hash: ImageItem(
            hash,
            np.zeros((32, 32, 3), np.uint8),
            {"pixel_values": np.ones((4, 6), np.float32), "image_grid_thw": np.array([[1, 2, 2]])},
            1,
        )
        for hash in hashes
    }
    placeholders = tuple(Placeholder(2 * place + 1, 1, hash) for place, hash in enumerate(hashes))
    return Prompt(np.arange(2 * len(hashes) + 1), placeholders, tuple(images[hash] for hash in hashes))


async def ask(client: VllmClient, *hashes: str) -> Answer:
    return await client.generate("train/000001/00/00", prompt(*hashes), SAMPLING)


@pytest.mark.parametrize("forgotten", FORGOTTEN)
def test_an_images_data_is_sent_once_and_then_only_its_hash(forgotten: Callable[[], HttpResponse]) -> None:
    async def scenario() -> None:
        server = Server(forgotten)
        client = client_of(server)
        await ask(client, "a", "b", "a")
        await ask(client, "a", "b", "a")
        answer = await ask(client, "b", "c")
        assert answer.token_ids.tolist() == [5, 9]
        assert server.requests == [
            [("a", True), ("b", True)],  # the prompt up to the last new image
            [("a", False), ("b", False), ("a", False)],
            [("a", False), ("b", False), ("a", False)],
            [("b", False), ("c", True)],
            [("b", False), ("c", False)],
        ]

    asyncio.run(scenario())


def test_more_banned_tokens_than_a_server_takes_are_not_sent() -> None:
    server = Server(lambda: sampled())
    many = replace(SAMPLING, banned_token_ids=tuple(range(1025)))
    with pytest.raises(EngineError, match=r"server takes at most 1024 banned tokens.* 1025 .*inference\.urls=\[\]"):
        asyncio.run(client_of(server).generate("train/0", prompt(), many))
    assert not server.requests


def test_siblings_wait_for_the_one_that_sends_their_image() -> None:
    async def scenario() -> None:
        server = Server(lambda: sampled())
        client = client_of(server)
        server.go_on.clear()
        first = asyncio.create_task(ask(client, "a", "b"))
        await server.arrived.wait()
        others = [asyncio.create_task(ask(client, *hashes)) for hashes in (("a", "b"), ("b", "a"), ("c", "a"))]
        while len(server.requests) < 2:
            await asyncio.sleep(0)  # ("c", "a") does not wait for "a", because "c" is new and comes first in its prompt
        server.go_on.set()
        await asyncio.gather(first, *others)
        sent = [hash for request in server.requests for hash, has_data in request if has_data]
        assert sorted(sent) == ["a", "b", "c"]

    asyncio.run(scenario())


def test_a_request_that_waits_for_an_image_sends_it_when_the_sender_fails() -> None:
    async def scenario() -> None:
        server = Server(lambda: sampled())
        client = client_of(server)
        server.go_on.clear()
        first = asyncio.create_task(ask(client, "a"))
        await server.arrived.wait()
        second = asyncio.create_task(ask(client, "a"))
        await asyncio.sleep(0)
        first.cancel()
        server.go_on.set()
        assert (await second).token_ids.tolist() == [5, 9]
        assert server.requests == [[("a", True)], [("a", True)], [("a", False)]]

    asyncio.run(scenario())


@pytest.mark.parametrize("forgotten", FORGOTTEN)
@pytest.mark.parametrize("new", [(), ("c",)])
def test_a_server_that_forgot_gets_all_data_again(forgotten: Callable[[], HttpResponse], new: tuple[str, ...]) -> None:
    async def scenario() -> None:
        server = Server(forgotten)
        client = client_of(server)
        await ask(client, "a", "b")
        server.requests.clear()
        server.forgets = True
        assert (await ask(client, "a", "b", *new)).token_ids.tolist() == [5, 9]
        assert server.requests == [
            [("a", False), ("b", False), *((hash, True) for hash in new)],
            [(hash, True) for hash in ("a", "b", *new)],
        ]
        await ask(client, "a", "b", *new)
        assert server.requests[2:] == [[(hash, False) for hash in ("a", "b", *new)]]

    asyncio.run(scenario())


def test_a_server_without_an_image_cache_gets_data_every_time() -> None:
    async def scenario() -> None:
        server = Server(lambda: sampled())
        client = client_of(server)
        client.keeps_images = False
        await ask(client, "a")
        await ask(client, "a")
        assert server.requests == [[("a", True)], [("a", True)]]

    asyncio.run(scenario())


def test_a_text_prompt_is_one_request() -> None:
    async def scenario() -> None:
        server = Server(lambda: sampled())
        await ask(client_of(server))
        assert server.requests == [[]]

    asyncio.run(scenario())


def failing(respond: Callable[[httpx.Request], HttpResponse], is_healthy: bool) -> Handler:
    async def handler(request: httpx.Request) -> HttpResponse:
        if request.url.path == "/health":
            return httpx.Response(200 if is_healthy else 503)
        return respond(request)

    return handler


def broken(request: httpx.Request) -> HttpResponse:
    raise httpx.ReadError("connection reset", request=request)


@pytest.mark.parametrize(
    ("respond", "is_healthy", "error", "message"),
    [
        (
            lambda request: httpx.Response(400, json={"error": {"message": "prompt too long"}}),
            True,
            EngineError,
            "rollout train/000001/00/00: server answered with HTTP 400: prompt too long",
        ),
        (lambda request: httpx.Response(500, text="oops"), True, EngineError, "train/000001/00/00.*HTTP 500: oops"),
        (lambda request: httpx.Response(500, text="oops"), False, ServerLostError, "oops"),
        (broken, True, ServerLostError, "connection reset"),
        (lambda request: sampled(finish_reason="abort"), True, ServerLostError, "dropped"),
        (lambda request: sampled(), True, EngineError, "train/000001/00/00.*a completion without tokens"),
        (
            lambda request: httpx.Response(200, text="{}"),
            True,
            EngineError,
            "train/000001/00/00.*a malformed answer",
        ),
    ],
)
def test_each_failure_raises_the_error_that_says_whether_to_retry(
    respond: Callable[[httpx.Request], HttpResponse], is_healthy: bool, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        asyncio.run(ask(client_of(failing(respond, is_healthy))))


def test_a_request_waits_until_the_server_is_given_up() -> None:
    """It has no deadline of its own; a control call has one, and gives the server up."""

    async def scenario() -> None:
        server = Server(lambda: sampled())
        server.go_on.clear()
        client = client_of(server, timeout_s=0.05)
        asked = [asyncio.create_task(ask(client, "a")), asyncio.create_task(ask(client, "b"))]
        await asyncio.sleep(0.2)
        assert not any(task.done() for task in asked)
        with pytest.raises(ServerLostError, match=r"did not answer POST /pause within .*request_timeout_s=0\.05"):
            await client.call("POST", "/pause", json={})
        for task in asked:
            with pytest.raises(ServerLostError, match="POST /pause"):
                await task
        with pytest.raises(ServerLostError, match="POST /pause"):
            await ask(client)
        assert client._counts["inference/timeouts"] == 1

    asyncio.run(scenario())


@pytest.mark.parametrize("seed", [2**70, -1, 1.5])
def test_a_seed_that_would_kill_the_engine_is_a_bug_of_the_caller(seed: int) -> None:
    with pytest.raises(AssertionError, match="seed"):
        asyncio.run(client_of(Server(lambda: sampled())).generate("train/0", prompt(), replace(SAMPLING, seed=seed)))


def test_the_health_check_does_not_send_the_key() -> None:
    seen: dict[str, str | None] = {}

    async def handler(request: httpx.Request) -> HttpResponse:
        seen[request.url.path] = request.headers.get("authorization")
        return httpx.Response(200, json={})

    async def scenario() -> None:
        client = client_of(handler)
        assert await client.is_healthy()
        await client.call("POST", "/resume")

    asyncio.run(scenario())
    assert seen == {"/health": None, "/resume": "Bearer key"}


def test_encoded_images_are_kept_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        images = prompt("a", "b", "c").images
        size = len((await ItemEncoder(Dtype.float32).encode(images[:1], QWEN))["a"])
        monkeypatch.setattr("vlmrl.inference.vllm.item_encoder.ENCODED_LIMIT_BYTES", 2 * size)
        encoder = ItemEncoder(Dtype.float32)
        encoded = await encoder.encode(images, QWEN)
        again = await encoder.encode(images[2:], QWEN)
        assert again["c"] is encoded["c"]
        assert (await encoder.encode(images[:1], QWEN))["a"] is not encoded["a"]

    asyncio.run(scenario())


# ── pictures: a server without our endpoint, and images that vLLM's features cannot express ─────────────────────────


class PictureServer:
    """Writes `before IMG IMG after` (50, 9, 9, 51) for a placeholder (7), as vLLM does for `content_parts`."""

    def __init__(self) -> None:
        self.requests: list[list[tuple[str, bool]]] = []
        self.compared: list[list[str]] = []
        self.held: set[str] = set()
        self.error: str | None = None
        self.expand: Callable[[list[int]], list[int] | None] = lambda ids: [
            token for id in ids for token in ([50, 9, 9, 51] if id == 7 else [id])
        ]

    async def __call__(self, request: httpx.Request) -> HttpResponse:
        body = orjson.loads(request.content)
        if request.url.path == "/collective_rpc":
            assert body["method"] == "vlmrl_compare_images"
            self.compared.append(list(body["kwargs"]["documents"]))
            written = {"placeholder": [7], "before": [50], "after": [51], "length": 2, "gaps": []}
            found = {"error": self.error} if self.error else written
            return httpx.Response(200, json={"results": [dict.fromkeys(self.compared[-1], found)] * 2})
        parts = body["content_parts"]
        assert body["return_token_ids"]
        assert "features" not in body
        self.requests.append([(part["uuid"], part["url"] is not None) for part in parts])
        self.held.update(hash for hash, has_data in self.requests[-1] if has_data)
        if any(part["uuid"] not in self.held for part in parts):
            return httpx.Response(400, json={"error": {"message": "Cache miss for image at index 0"}})
        answer = orjson.loads(sampled(5, 9).content)
        return httpx.Response(200, json=answer | {"prompt_token_ids": self.expand(body["token_ids"])})


def tiled(*hashes: str) -> Prompt:
    """Per image a token of text, what is written for it, and a token of text."""
    images = tuple(
        ImageItem(hash, np.full((2, 3, 3), 40, np.uint8), {"pixel_values": np.ones((1, 6), np.float32)}, 2)
        for hash in hashes
    )
    ids = [id for _ in hashes for id in (1, 50, 9, 9, 51, 2)]
    places = tuple(Placeholder(6 * place + 2, 2, hash) for place, hash in enumerate(hashes))
    return Prompt(np.array(ids), places, images)


def picture_client(server: PictureServer) -> VllmClient:
    client = client_of(server)
    client.image_fields = TILED
    return client


async def ask_tiled(client: VllmClient, *hashes: str) -> Answer:
    return await client.generate("train/000001/00/00", tiled(*hashes), SAMPLING)


def test_a_picture_is_compared_and_sent_once() -> None:
    async def scenario() -> None:
        server = PictureServer()
        client = picture_client(server)
        await ask_tiled(client, "a", "b", "a")
        assert (await ask_tiled(client, "b", "c")).token_ids.tolist() == [5, 9]
        assert server.compared == [["a", "b"], ["c"]]
        assert server.requests == [
            [("a", True), ("b", True)],
            [("a", False), ("b", False), ("a", False)],
            [("b", False), ("c", True)],
            [("b", False), ("c", False)],
        ]

    asyncio.run(scenario())


def test_a_server_that_forgot_gets_the_pictures_again() -> None:
    async def scenario() -> None:
        server = PictureServer()
        client = picture_client(server)
        await ask_tiled(client, "a", "b")
        server.requests.clear()
        server.held.clear()
        await ask_tiled(client, "a", "b")
        assert server.requests == [[("a", False), ("b", False)], [("a", True), ("b", True)]]
        assert server.compared == [["a", "b"]]

    asyncio.run(scenario())


def test_a_picture_of_which_the_server_makes_another_image_is_not_sent() -> None:
    server = PictureServer()
    server.error = "pixel_values of vLLM's processor has other values than the renderer's"
    with pytest.raises(EngineError, match=r"train/000001/00/00: server makes another image of a: pixel_values .*Route"):
        asyncio.run(ask_tiled(picture_client(server), "a"))
    assert not server.requests


@pytest.mark.parametrize(
    ("expand", "message"),
    [
        (lambda ids: ids, r"it has 2 tokens there and 5 here"),  # as where the server finds no placeholder
        (lambda ids: [1, 50, 9, 9, 52], r"token 4 of 5 is 52 there and 51 here"),
        (lambda ids: None, r"its answer has no prompt_token_ids"),  # as vLLM 0.26, which knows no content_parts
    ],
)
def test_an_answer_for_another_prompt_is_refused(expand: Callable[[list[int]], list[int] | None], message: str) -> None:
    server = PictureServer()
    server.expand = expand
    with pytest.raises(EngineError, match=f"did not sample from the renderer's prompt: {message}.*--middleware"):
        asyncio.run(ask_tiled(picture_client(server), "a"))


def test_a_prompt_that_the_server_would_write_otherwise_is_not_sent() -> None:
    """As where newlines around an image are merged with their neighbours."""
    server = PictureServer()
    whole = tiled("a")
    merged = replace(whole, token_ids=np.array([1, 60, 9, 9, 51, 2]))
    with pytest.raises(EngineError, match=r"would write another prompt .* \[60\] before .* vLLM writes \[50\]"):
        asyncio.run(picture_client(server).generate("train/000001/00/00", merged, SAMPLING))
    assert not server.requests


# ── videos ──────────────────────────────────────────────────────────────────────────────────────────────────


def film_prompt(**more: np.ndarray) -> Prompt:
    """A video of two times two tokens, and an image."""
    image = prompt("a").mm_items[0]
    kwargs = {"pixel_values_videos": np.ones((16, 6), np.float32), "video_grid_thw": np.array([[2, 2, 4]]), **more}
    frames, times = np.zeros((4, 32, 64, 3), np.uint8), np.arange(4) / 2
    film = VideoItem("film", frames, times, 2.0, ("x",) * 4, kwargs, 4)
    places = (Placeholder(1, 4, "film", modality="video"), Placeholder(6, 1, "a"))
    return Prompt(np.arange(8), places, (film, image))


SECONDS = {"second_per_grid_ts": np.array([1.0])}


class VideoServer:
    """vLLM's own endpoint; workers report `fields`."""

    def __init__(self, **fields: Any) -> None:
        self.fields = fields
        self.asked = 0
        self.features: list[Any] = []

    async def __call__(self, request: httpx.Request) -> HttpResponse:
        body = orjson.loads(request.content)
        if request.url.path == "/collective_rpc":
            assert body["method"] == "vlmrl_video_fields"
            self.asked += 1
            return httpx.Response(200, json={"results": [self.fields]})
        self.features.append(body["features"])
        return sampled(5, 9)


def reported(fields: ImageFields) -> dict[str, Any]:
    listed = [[field.name, field.kind, field.keep_on_cpu, field.dims] for field in fields.fields]
    return {"fields": listed, "has_gaps": fields.has_gaps, "has_lead": fields.has_lead}


def test_a_video_is_sent_once_next_to_an_image() -> None:
    async def scenario() -> None:
        server = VideoServer(**reported(QWEN2_VIDEOS))
        client = client_of(server)
        for _ in range(2):
            await client.generate("r", film_prompt(**SECONDS), SAMPLING)
        assert server.asked == 1
        sent = [
            {kind: [data is not None for data in f["kwargs_data"][kind]] for kind in f["kwargs_data"]}
            for f in server.features
        ]
        with_data, by_hash = {"video": [True], "image": [True]}, {"video": [False], "image": [False]}
        assert sent == [with_data, by_hash, by_hash]
        assert server.features[0]["mm_hashes"] == {"video": ["film"], "image": ["a"]}
        assert server.features[0]["mm_placeholders"]["video"] == [{"offset": 1, "length": 4}]

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("fields", "shown", "reason"),
    [
        ({"error": "its --limit-mm-per-prompt allows none"}, SECONDS, "takes no videos, because its --limit-mm"),
        (reported(QWEN2_VIDEOS), {}, "makes a video of other tensors"),
        (reported(replace(QWEN2_VIDEOS, has_lead=True)), SECONDS, "cannot be told which tokens .* --middleware"),
    ],
)
def test_a_video_that_a_server_cannot_show_is_refused(
    fields: dict[str, Any], shown: dict[str, np.ndarray], reason: str
) -> None:
    client = client_of(VideoServer(**fields))
    with pytest.raises(EngineError, match=reason):
        asyncio.run(client.generate("r", film_prompt(**shown), SAMPLING))
