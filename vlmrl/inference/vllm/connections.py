"""A connection pool for hundreds of concurrent requests to one server.

httpx's own pool checks every connection whenever a request starts or ends: with 288 rollouts in flight this took 60 %
of the run's processor time. This pool takes an idle connection or opens a new one, without a look at the others.
httpx does everything else.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import httpx

PEER_CREDENTIALS = struct.Struct("3i")
"""Process, user and group id (`struct ucred` in <sys/socket.h>)."""


class Connections(httpx.AsyncBaseTransport):
    """An httpx transport with one request per connection at a time, and no limit on the number of connections."""

    def __init__(self, keepalive_s: float, unix_socket: Path | None = None) -> None:
        """`keepalive_s`: seconds after which an idle connection is no longer used. `unix_socket`: connect to this
        socket, whatever the URL of a request."""
        self._socket = None if unix_socket is None else str(unix_socket)
        self._limits = httpx.Limits(max_connections=1, keepalive_expiry=keepalive_s)
        self._ssl = httpx.create_ssl_context(trust_env=False)  # takes milliseconds, so all connections share it
        self._idle: list[httpx.AsyncHTTPTransport] = []
        """A stack: the connection that was used last is taken first, so surplus connections stay idle and expire."""
        self._is_closed = False

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send `request` on a connection that no other request uses until the response is closed."""
        connection = self._idle.pop() if self._idle else self._open()
        try:
            response = await connection.handle_async_request(request)
        except BaseException:
            await connection.aclose()
            raise
        assert isinstance(response.stream, httpx.AsyncByteStream)
        response.stream = _Returning(response.stream, connection, self._take_back)
        return response

    async def _take_back(self, connection: httpx.AsyncHTTPTransport) -> None:
        """Keep a connection whose response is closed, for the next request."""
        if self._is_closed:  # while the request was in flight
            await connection.aclose()
        else:
            self._idle.append(connection)

    def _open(self) -> httpx.AsyncHTTPTransport:
        return httpx.AsyncHTTPTransport(self._ssl, limits=self._limits, uds=self._socket)

    async def aclose(self) -> None:
        """Close the idle connections. Connections in use close with their requests."""
        self._is_closed = True
        while self._idle:
            await self._idle.pop().aclose()


class _Returning(httpx.AsyncByteStream):
    """The body of a response; closing it returns the connection to the pool."""

    def __init__(
        self,
        stream: httpx.AsyncByteStream,
        connection: httpx.AsyncHTTPTransport,
        take_back: Callable[[httpx.AsyncHTTPTransport], Awaitable[None]],
    ) -> None:
        self._stream = stream
        self._connection = connection
        self._take_back = take_back

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._stream.__aiter__()

    async def aclose(self) -> None:
        try:
            await self._stream.aclose()
        except BaseException:  # cancelled, too: nobody else knows the connection
            await self._connection.aclose()
            raise
        await self._take_back(self._connection)


async def is_own(unix_socket: Path) -> bool:
    """Whether a process of this user listens on a Unix socket. Raises `OSError` where nobody listens."""
    _, writer = await asyncio.open_unix_connection(unix_socket)
    try:
        end: socket.socket = writer.get_extra_info("socket")
        credentials = end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER_CREDENTIALS.size)
    finally:
        writer.close()
    _, user, _ = PEER_CREDENTIALS.unpack(credentials)
    return bool(user == os.geteuid())
