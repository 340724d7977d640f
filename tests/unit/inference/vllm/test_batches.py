"""Batches of requests to a scripted server. test_engine.py has the same with real servers."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable

import httpx
import numpy as np
import pytest

from vlmrl.inference.vllm import batches as vllm_batches
from vlmrl.inference.vllm.batches import Batcher, BatchLostError
from vlmrl.inference.vllm.frames import Batch, pack_answer, pack_error, request_header, unpack_batch
from vlmrl.inference.vllm.wire import WireError
from vlmrl.types import SamplingParams

SAMPLING = SamplingParams(max_new_tokens=2, temperature=1.0, stop_token_ids=(9,), banned_token_ids=(), seed=0)


class Server(httpx.AsyncBaseTransport):
    """Reads batches. A test puts the parts of each response into `says`: bytes, an error, or None for the end."""

    def __init__(self, status: int = 200) -> None:
        self.batches: list[Batch] = []
        self.says: list[asyncio.Queue[bytes | Exception | None]] = []
        self.left = 0
        """Responses that the client closed before their end."""
        self._status = status

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.batches.append(unpack_batch(await request.aread()))
        self.says.append(asyncio.Queue())
        return httpx.Response(self._status, stream=_Stream(self, self.says[-1]))


class _Stream(httpx.AsyncByteStream):
    def __init__(self, server: Server, says: asyncio.Queue[bytes | Exception | None]) -> None:
        self._server, self._says, self._ended = server, says, False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while (said := await self._says.get()) is not None:
            if isinstance(said, Exception):
                raise said
            yield said
        self._ended = True

    async def aclose(self) -> None:
        self._server.left += not self._ended


def batcher_to(server: Server, counts: Counter[str] | None = None) -> Batcher:
    http = httpx.AsyncClient(base_url="http://server", transport=server)
    return Batcher(http, counts if counts is not None else Counter())


async def ask(batcher: Batcher, name: str, data: dict[str, bytes] | None = None) -> list[int]:
    header = request_header(name, np.arange(3), (), SAMPLING, is_whole=True)
    response = await batcher.send(header, data or {})
    return [int(token) for token in response.answer().token_ids]


def answer(number: int, *tokens: int) -> bytes:
    return pack_answer(number, list(tokens), [-1.0] * len(tokens), None, "length")


async def until(holds: Callable[[], bool]) -> None:
    while not holds():
        await asyncio.sleep(0)


def test_requests_of_one_turn_are_one_http_request_and_responses_come_one_by_one() -> None:
    async def scenario() -> None:
        server, counts = Server(), Counter[str]()
        batcher = batcher_to(server, counts)
        asked = [asyncio.create_task(ask(batcher, name)) for name in "abc"]
        await until(lambda: len(server.says) == 1)
        assert [header["request_id"] for header in server.batches[0].requests] == ["a", "b", "c"]
        assert counts["wire/bytes_sent"] > 0
        server.says[0].put_nowait(answer(2, 5) + answer(0, 6)[:10])
        assert await asked[2] == [5]
        assert not asked[0].done()
        later = asyncio.create_task(ask(batcher, "d"))
        await until(lambda: len(server.says) == 2)
        server.says[0].put_nowait(answer(0, 6)[10:] + answer(1, 7, 8))
        server.says[0].put_nowait(None)
        server.says[1].put_nowait(answer(0, 9))
        assert [await one for one in (*asked[:2], later)] == [[6], [7, 8], [9]]
        server.says[1].put_nowait(None)

    asyncio.run(scenario())


@pytest.mark.parametrize("end", [None, httpx.ReadError("connection reset")])
def test_a_response_that_breaks_off_loses_only_the_requests_without_an_answer(end: Exception | None) -> None:
    async def scenario() -> None:
        server = Server()
        batcher = batcher_to(server)
        asked = [asyncio.create_task(ask(batcher, name)) for name in "ab"]
        await until(lambda: len(server.says) == 1)
        server.says[0].put_nowait(answer(0, 5))
        server.says[0].put_nowait(end)
        assert await asked[0] == [5]
        with pytest.raises(BatchLostError, match="response ended" if end is None else "connection reset"):
            await asked[1]

    asyncio.run(scenario())


def test_the_connection_is_closed_when_the_last_caller_is_cancelled() -> None:
    async def scenario() -> None:
        server = Server()
        batcher = batcher_to(server)
        asked = [asyncio.create_task(ask(batcher, name)) for name in "ab"]
        await until(lambda: len(server.says) == 1)
        asked[0].cancel()
        await asyncio.sleep(0)
        assert not server.left  # the other caller still waits
        asked[1].cancel()
        await until(lambda: server.left == 1)

    asyncio.run(scenario())


def test_an_error_fails_its_own_request_and_a_refusal_fails_all() -> None:
    async def scenario(status: int) -> list[BaseException | list[int]]:
        server = Server(status)
        batcher = batcher_to(server)
        asked = [asyncio.create_task(ask(batcher, name)) for name in "ab"]
        await until(lambda: len(server.says) == 1)
        server.says[0].put_nowait(pack_error(0, 400, "too long") + answer(1, 5))
        server.says[0].put_nowait(None)
        return await asyncio.gather(*asked, return_exceptions=True)

    first, second = asyncio.run(scenario(200))
    assert isinstance(first, WireError)  # an error has no tokens
    assert second == [5]
    assert all(isinstance(one, WireError) for one in asyncio.run(scenario(503)))


def test_a_batch_has_an_images_data_once_and_large_data_makes_several_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        monkeypatch.setattr(vllm_batches, "BATCH_LIMIT_BYTES", 10)
        server = Server()
        batcher = batcher_to(server)
        for data in ({"x": b"12345"}, {"x": b"12345"}, {"y": b"6"}):
            asyncio.get_running_loop().create_task(ask(batcher, "a", data))
        await until(lambda: len(server.says) == 2)
        documents = [{hash: bytes(data) for hash, data in b.documents.items()} for b in server.batches]
        assert sorted(documents, key=len) == [{"x": b"12345"}, {"y": b"6"}]

    asyncio.run(scenario())


def test_a_malformed_response_is_refused() -> None:
    async def scenario() -> None:
        server = Server()
        batcher = batcher_to(server)
        asked = asyncio.create_task(ask(batcher, "a"))
        await until(lambda: len(server.says) == 1)
        server.says[0].put_nowait(b"\x02\x00\x00\x00\x00\x00\x00\x00no")
        with pytest.raises(WireError, match="JSONDecodeError"):
            await asked

    asyncio.run(scenario())
