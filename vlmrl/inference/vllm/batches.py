"""The client's side of the run's own route: all that is asked of a server in one turn of the event loop is one HTTP
request, whose response brings each answer as it comes.

    ask ─▶ waits for the end of the turn ─▶ POST with everything that was asked ─▶ frames ─▶ each to who asked

A request per rollout would cost a millisecond of httpx each, on the one event loop that all rollouts share: a third of
a second before the last of 256 has even left.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from vlmrl.inference.vllm.frames import ROUTE, Response, Responses, pack_batch
from vlmrl.inference.vllm.wire import WireError

BATCH_LIMIT_BYTES = 64 * 1024**2
"""Of images' data in one HTTP request: a body is put together, and read by the server, as a whole."""


class BatchLostError(Exception):
    """The connection broke, or the response ended, before the answer."""


@dataclass(eq=False)
class _Asked:
    header: Mapping[str, Any]
    documents: Mapping[str, bytes]
    reply: asyncio.Future[Response]
    batch: _Batch | None = None


@dataclass(eq=False)
class _Batch:
    members: list[_Asked] = field(default_factory=list)
    task: asyncio.Task[None] | None = None


class Batches:
    """Of one server."""

    def __init__(self, http: httpx.AsyncClient, counts: Counter[str]) -> None:
        self._http = http
        self._counts = counts
        self._asked: list[_Asked] = []
        self._under_way: set[asyncio.Task[None]] = set()

    async def ask(self, header: Mapping[str, Any], documents: Mapping[str, bytes]) -> Response:
        """The reply to one request (`vllm_frames.request_header`); `documents` go with it. Raises `BatchLostError`,
        and `WireError` for a response that is none."""
        loop = asyncio.get_running_loop()
        asked = _Asked(header, documents, loop.create_future())
        if not self._asked:
            loop.call_soon(self._send_off)
        self._asked.append(asked)
        try:
            return await asked.reply
        except asyncio.CancelledError:
            batch = asked.batch
            if batch is not None and batch.task is not None and all(one.reply.done() for one in batch.members):
                batch.task.cancel()  # nobody waits any more: the server drops the rest
            raise

    def _send_off(self) -> None:
        asked, self._asked = self._asked, []
        batches: list[_Batch] = []
        size = 0
        for one in asked:
            if one.reply.done():  # given up already
                continue
            added = sum(map(len, one.documents.values()))
            if not batches or size + added > BATCH_LIMIT_BYTES:
                batches.append(_Batch())
                size = 0
            size += added
            one.batch = batches[-1]
            batches[-1].members.append(one)
        for batch in batches:
            batch.task = asyncio.create_task(self._exchange(batch.members))
            self._under_way.add(batch.task)
            batch.task.add_done_callback(self._under_way.discard)

    async def _exchange(self, members: list[_Asked]) -> None:
        error: Exception = BatchLostError("the response ended before the last answer")
        try:
            await self._post(members)
        except WireError as wrong:
            error = wrong
        except httpx.TransportError as broken:
            error = BatchLostError(f"{type(broken).__name__} {broken}")
        finally:
            for one in members:
                if not one.reply.done():
                    one.reply.set_exception(error)

    async def _post(self, members: list[_Asked]) -> None:
        documents = {hash: data for one in members for hash, data in one.documents.items()}
        headers = [one.header for one in members]
        # Megabytes are not put together on the event loop.
        body = await asyncio.to_thread(pack_batch, headers, documents) if documents else pack_batch(headers, {})
        self._counts["wire/bytes_sent"] += len(body)
        async with self._http.stream("POST", ROUTE, content=body, headers=CONTENT_TYPE) as response:
            if response.status_code != 200:
                whole = Response(
                    response.status_code, {"error": (await response.aread()).decode(errors="replace")}, _NONE
                )
                for one in members:
                    if not one.reply.done():
                        one.reply.set_result(whole)
                return
            responses = Responses()
            async for chunk in response.aiter_raw():
                for number, reply in responses.feed(chunk):
                    if not members[number].reply.done():
                        members[number].reply.set_result(reply)


CONTENT_TYPE = {"content-type": "application/octet-stream"}
_NONE = memoryview(b"")
