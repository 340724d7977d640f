"""The port that makes a server reachable from other hosts, with real sockets."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest

from vlmrl.inference.vllm.relay import Relay


def test_bytes_go_through_and_the_port_stays_between_two_launches(tmp_path: Path) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        body = await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]))
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body) + body)
        await writer.drain()
        writer.close()

    async def scenario() -> None:
        relay = Relay()
        url = f"http://127.0.0.1:{await relay.listen('127.0.0.1')}"
        async with httpx.AsyncClient() as http:
            with pytest.raises(httpx.TransportError):
                await http.get(url)
            for launch in ("a", "b"):
                relay.target = tmp_path / launch
                server = await asyncio.start_unix_server(answer, relay.target)
                body = launch.encode() * 2_000_000
                assert (await http.post(url, content=body)).content == body
                server.close()
                relay.target = None
                with pytest.raises(OSError, match="in use"):
                    await asyncio.start_server(answer, "127.0.0.1", int(url.rpartition(":")[2]))
        await relay.close()

    asyncio.run(scenario())
