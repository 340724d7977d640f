"""Makes a server reachable from other hosts: a TCP port whose connections end at the server's Unix socket.

    client ──TCP──▶ Relay ──▶ <folder of the launch>/http ──▶ vLLM

vLLM would bind its own port long before it listens on it, and another user of the host could listen there meanwhile and
be sent the key. The relay listens before the first server starts, and as long as its task lives, so the port never is
anybody else's, also between two launches.
"""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

CHUNK_BYTES = 256 * 1024


class Relay:
    """Passes on bytes in both directions. Belongs to one event loop."""

    def __init__(self) -> None:
        self.target: Path | None = None
        """Unix socket of the current launch; without one, a connection is closed at once."""
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def listen(self, address: str) -> int:
        """Listen on a free port of `address` → the port."""
        self._server = await asyncio.start_server(self._connected, address, 0)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def close(self) -> None:
        """Close the port and all connections."""
        if self._server is not None:
            self._server.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._pass_on(reader, writer))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(OSError):
            if self.target is None:
                return
            from_server, to_server = await asyncio.open_unix_connection(self.target)
            with contextlib.closing(to_server):
                pumps = [asyncio.create_task(_pump(reader, to_server)), asyncio.create_task(_pump(from_server, writer))]
                try:
                    # HTTP connections are closed as a whole, so the end of one direction is the end of both.
                    await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for pump in pumps:
                        pump.cancel()
                    await asyncio.gather(*pumps, return_exceptions=True)


async def _pump(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    while chunk := await source.read(CHUNK_BYTES):
        target.write(chunk)
        await target.drain()
