"""Images that are sent before their request, to a scripted server. test_engine.py has the same with a real one."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest

from support.image_fields import QWEN
from vlmrl.config.model import Dtype
from vlmrl.errors import EngineError
from vlmrl.inference.vllm import prefetched
from vlmrl.inference.vllm.client import VllmClient
from vlmrl.inference.vllm.frames import FORGOTTEN, ROUTE, pack_answer, pack_error, unpack_batch
from vlmrl.inference.vllm.item_encoder import ItemEncoder
from vlmrl.inference.vllm.prefetched import Prefetched
from vlmrl.types import ImageItem, Placeholder, Prompt, SamplingParams

SAMPLING = SamplingParams(max_new_tokens=2, temperature=1.0, stop_token_ids=(9,), banned_token_ids=(), seed=0)


class Server:
    """The run's own endpoint: it keeps the data of images until their request."""

    def __init__(self, status: int = 200) -> None:
        self.status = status
        self.posts: list[tuple[list[str], list[str]]] = []
        """Per HTTP request: the names of its requests, and the hashes of the data."""
        self.held: set[str] = set()

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        assert request.url.path == ROUTE
        batch = unpack_batch(request.content)
        self.posts.append(([header["request_id"] for header in batch.requests], [*batch.documents]))
        if self.status != 200:
            return httpx.Response(self.status, json={"error": "no"})
        self.held |= batch.documents.keys()
        answers = []
        for number, header in enumerate(batch.requests):
            lacks = any(hash not in self.held for hash, *_ in header["items"])
            answers.append(
                pack_error(number, FORGOTTEN, "") if lacks else pack_answer(number, [5, 9], [-1.0, -1.0], None, "stop")
            )
        return httpx.Response(200, stream=httpx.ByteStream(b"".join(answers)))


def client_of(server: Server) -> VllmClient:
    client = VllmClient(
        "server", "http://s", "key", ItemEncoder(Dtype.float32), Counter(), 60.0, httpx.MockTransport(server)
    )
    client.keeps_images = client.has_route = True
    client.image_fields = QWEN
    return client


def prompt(*hashes: str) -> Prompt:
    items = [
        ImageItem(
            hash,
            np.zeros((32, 32, 3), np.uint8),
            {"pixel_values": np.ones((4, 6), np.float32), "image_grid_thw": np.array([[1, 2, 2]])},
            1,
        )
        for hash in hashes
    ]
    placeholders = tuple(Placeholder(2 * place + 1, 1, hash) for place, hash in enumerate(hashes))
    return Prompt(np.arange(2 * len(hashes) + 1), placeholders, tuple(items))


def run(scenario: Callable[[], Any]) -> Any:
    return asyncio.run(scenario())


def test_the_images_of_siblings_are_sent_once_ahead_and_the_requests_have_hashes_alone() -> None:
    async def scenario() -> None:
        server = Server()
        client = client_of(server)
        await asyncio.gather(*(client.prefetch(prompt("a", "b")) for _ in range(3)), client.prefetch(prompt("b", "c")))
        assert sorted(hash for names, hashes in server.posts for hash in hashes) == ["a", "b", "c"]
        assert not any(names for names, _ in server.posts), "nothing is generated"
        sent = len(server.posts)
        answers = await asyncio.gather(*(client.generate(f"r/{i}", prompt("a", "b"), SAMPLING) for i in range(3)))
        assert [answer.token_ids.tolist() for answer in answers] == [[5, 9]] * 3
        assert all(not hashes for _, hashes in server.posts[sent:])
        await client.close()

    run(scenario)


def test_what_is_sent_ahead_is_bounded_until_requests_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        server = Server()
        client = client_of(server)
        size = client._size_of(prompt("a").images[0])
        client._prefetched = Prefetched(limit_bytes=2 * size)
        for hash in "abc":
            await client.prefetch(prompt(hash))
        assert [hashes for _, hashes in server.posts] == [["a"], ["b"]], "the third one has no room"
        await client.generate("r/b", prompt("b"), SAMPLING)  # a was used on another server
        for hash in "cde":
            await client.prefetch(prompt(hash))
        assert [hashes for _, hashes in server.posts if hashes] == [["a"], ["b"], ["c"], ["d"]]
        answer = await client.generate("r/e", prompt("e"), SAMPLING)
        assert answer.token_ids.tolist() == [5, 9], "what was not sent ahead is sent with its request"
        await client.close()

    assert prefetched.PREFETCH_LIMIT_BYTES == 512 << 20
    run(scenario)


def test_a_server_without_the_endpoint_gets_nothing_ahead() -> None:
    async def scenario() -> None:
        for missing in ("has_route", "keeps_images"):
            server = Server()
            client = client_of(server)
            setattr(client, missing, False)
            await client.prefetch(prompt("a"))
            assert not server.posts
            await client.close()
        server = Server()
        client = client_of(server)
        await client.prefetch(prompt())
        assert not server.posts, "text has nothing to send"
        await client.close()

    run(scenario)


def test_images_that_the_server_refuses_ahead_are_refused_again_at_their_request() -> None:
    async def scenario() -> None:
        server = Server(status=400)
        client = client_of(server)
        for attempt in (client.prefetch(prompt("a")), client.generate("r/a", prompt("a"), SAMPLING)):
            with pytest.raises(EngineError, match="refused the images"):
                await attempt
        server.status = 200
        assert (await client.generate("r/a", prompt("a"), SAMPLING)).token_ids.tolist() == [5, 9]
        await client.close()

    run(scenario)
