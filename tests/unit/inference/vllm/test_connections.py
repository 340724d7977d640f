"""The connection pool with a real server on the loopback device that counts its connections."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import httpx
import pytest

from vlmrl.inference.vllm.connections import Connections


class Server:
    """Answers every request with its path once `go_on` is set. Closes the connection amid its answer to /broken."""

    def __init__(self) -> None:
        self.opened = 0
        self.closed = 0
        self.waiting = 0
        self.all_wait = asyncio.Event()
        self.expected = 0
        self.go_on = asyncio.Event()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.opened += 1
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                path = (await reader.readuntil(b"\r\n\r\n")).split()[1]
                self.waiting += 1
                if self.waiting == self.expected:
                    self.all_wait.set()
                await self.go_on.wait()
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(path))
                if path == b"/broken":
                    writer.write(b"/bro")
                    break
                writer.write(path)
        self.closed += 1
        writer.close()


@asynccontextmanager
async def running() -> AsyncIterator[tuple[Server, httpx.AsyncClient]]:
    server = Server()
    async with await asyncio.start_server(server.answer, "127.0.0.1", 0) as listening:
        port = listening.sockets[0].getsockname()[1]
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", transport=Connections(5.0)) as client:
            yield server, client
        while server.closed < server.opened:  # wait until the server notices what the client has closed
            await asyncio.sleep(0)


def test_as_many_connections_as_requests_at_a_time_and_no_more() -> None:
    async def main() -> None:
        async with running() as (server, client):
            server.expected = 50
            requests = [asyncio.create_task(client.get(f"/{i}")) for i in range(50)]
            await server.all_wait.wait()
            server.go_on.set()
            assert [(await request).text for request in requests] == [f"/{i}" for i in range(50)]
            for i in range(20):
                assert (await client.get(f"/again{i}")).text == f"/again{i}"
            assert server.opened == 50

    asyncio.run(main())


def test_a_broken_connection_is_not_used_again() -> None:
    async def main() -> None:
        async with running() as (server, client):
            server.go_on.set()
            with pytest.raises(httpx.RemoteProtocolError):
                await client.get("/broken")
            assert (await client.get("/after")).text == "/after"
            assert server.opened == 2

    asyncio.run(main())


def test_a_cancelled_request_closes_its_connection() -> None:
    async def main() -> None:
        async with running() as (server, client):
            server.expected = 1
            request = asyncio.create_task(client.get("/slow"))
            await server.all_wait.wait()
            request.cancel()
            with pytest.raises(asyncio.CancelledError):
                await request
            server.go_on.set()
            assert (await client.get("/next")).text == "/next"
            assert server.opened == 2

    asyncio.run(main())


def test_a_request_that_outlives_its_client_closes_its_connection() -> None:
    """As at a restart, where the client of the lost server is closed."""

    async def main() -> None:
        async with running() as (server, client):
            server.expected = 1
            request = asyncio.create_task(client.get("/late"))
            await server.all_wait.wait()
            await client.aclose()
            server.go_on.set()
            assert (await request).text == "/late"
            async with asyncio.timeout(10):
                while server.closed == 0:
                    await asyncio.sleep(0)

    asyncio.run(main())


def test_a_body_that_cannot_be_closed_costs_its_connection() -> None:
    class Cancelled(httpx.AsyncByteStream):
        async def aclose(self) -> None:
            raise asyncio.CancelledError

    class Connection(httpx.AsyncHTTPTransport):
        closed = 0

        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            return httpx.Response(200, stream=Cancelled())

        async def aclose(self) -> None:
            Connection.closed += 1

    class OfOne(Connections):
        def _open(self) -> httpx.AsyncHTTPTransport:
            return Connection()

    async def main() -> None:
        pool = OfOne(5.0)
        response = await pool.handle_async_request(httpx.Request("GET", "http://127.0.0.1/"))
        with pytest.raises(asyncio.CancelledError):
            await response.aclose()
        assert Connection.closed == 1
        await pool.aclose()
        assert Connection.closed == 1

    asyncio.run(main())
