"""Connections for hundreds of requests at a time to one server.

httpx's own pool looks at every connection whenever a request comes or goes: with 288 rollouts in flight that was 60 %
of the run's processor time. Here a request takes a connection that is idle, or makes one, and looks at no other.
Everything else is httpx's.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx


class Connections(httpx.AsyncBaseTransport):
    """A transport of httpx: one request per connection at a time, as many connections as there are requests."""

    def __init__(self, keepalive_s: float) -> None:
        """`keepalive_s`: seconds after which an idle connection is not used again."""
        self._limits = httpx.Limits(max_connections=1, keepalive_expiry=keepalive_s)
        self._ssl = httpx.create_ssl_context(trust_env=False)  # milliseconds, so made once
        self._idle: list[httpx.AsyncHTTPTransport] = []
        """The one that was used last is taken first; those at the bottom rest."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send `request` over a connection of its own until the response is closed."""
        connection = self._idle.pop() if self._idle else httpx.AsyncHTTPTransport(self._ssl, limits=self._limits)
        try:
            response = await connection.handle_async_request(request)
        except BaseException:
            await connection.aclose()
            raise
        assert isinstance(response.stream, httpx.AsyncByteStream)
        response.stream = _Returning(response.stream, connection, self._idle)
        return response

    async def aclose(self) -> None:
        """Close the idle ones; those in use close with their requests."""
        while self._idle:
            await self._idle.pop().aclose()


class _Returning(httpx.AsyncByteStream):
    """A response's body; closing it gives the connection back."""

    def __init__(
        self, stream: httpx.AsyncByteStream, connection: httpx.AsyncHTTPTransport, idle: list[httpx.AsyncHTTPTransport]
    ) -> None:
        self._stream = stream
        self._connection = connection
        self._idle = idle

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._stream.__aiter__()

    async def aclose(self) -> None:
        await self._stream.aclose()
        self._idle.append(self._connection)
