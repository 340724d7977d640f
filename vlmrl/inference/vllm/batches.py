"""Sends requests to the endpoint that the run adds to its servers: one HTTP request for all requests that are made in
one turn of the event loop.

    send ─▶ wait for the end of the turn ─▶ POST all pending requests ─▶ frames ─▶ each response to its caller

One HTTP request per rollout would cost a millisecond of httpx each, on the event loop that all rollouts share: the last
of 256 requests would leave after a third of a second.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from vlmrl.inference.vllm.frames import ROUTE, Response, ResponseReader, pack_batch
from vlmrl.inference.vllm.wire import WireError

BATCH_LIMIT_BYTES = 64 * 1024**2
"""Limit on the image data in one HTTP request. Client and server both hold a whole body in memory."""

CONTENT_TYPE = {"content-type": "application/octet-stream"}


class BatchLostError(Exception):
    """The connection broke, or the HTTP response ended, before the request's response arrived."""


@dataclass(eq=False)
class _Pending:
    header: Mapping[str, Any]
    documents: Mapping[str, bytes]
    response: asyncio.Future[Response]
    batch: _Batch | None = None


@dataclass(eq=False)
class _Batch:
    members: list[_Pending] = field(default_factory=list)
    task: asyncio.Task[None] | None = None


class Batcher:
    """Collects the requests to one server and sends them in batches."""

    def __init__(self, http: httpx.AsyncClient, counts: Counter[str]) -> None:
        """`counts` gets `wire/bytes_sent`."""
        self._http = http
        self._counts = counts
        self._pending: list[_Pending] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def send(self, header: Mapping[str, Any], documents: Mapping[str, bytes]) -> Response:
        """Send one request (`frames.request_header`) with `documents`, the data of images by hash → its response.

        Raises `BatchLostError`, and `WireError` for a malformed response.
        """
        loop = asyncio.get_running_loop()
        pending = _Pending(header, documents, loop.create_future())
        if not self._pending:
            loop.call_soon(self._send_pending)
        self._pending.append(pending)
        try:
            return await pending.response
        except asyncio.CancelledError:
            batch = pending.batch
            if batch is not None and batch.task is not None and all(member.response.done() for member in batch.members):
                batch.task.cancel()  # no caller waits for this batch any more, so the server drops its other requests
            raise

    def _send_pending(self) -> None:
        pending, self._pending = self._pending, []
        batches: list[_Batch] = []
        size = 0
        for request in pending:
            if request.response.done():  # cancelled in the meantime
                continue
            added = sum(map(len, request.documents.values()))
            if not batches or size + added > BATCH_LIMIT_BYTES:
                batches.append(_Batch())
                size = 0
            size += added
            request.batch = batches[-1]
            batches[-1].members.append(request)
        for batch in batches:
            batch.task = asyncio.create_task(self._exchange(batch.members))
            self._tasks.add(batch.task)
            batch.task.add_done_callback(self._tasks.discard)

    async def _exchange(self, members: list[_Pending]) -> None:
        error: Exception = BatchLostError("the HTTP response ended before the last request was answered")
        try:
            await self._post(members)
        except WireError as malformed:
            error = malformed
        except httpx.TransportError as broken:
            error = BatchLostError(f"{type(broken).__name__} {broken}")
        finally:
            for member in members:
                if not member.response.done():
                    member.response.set_exception(error)

    async def _post(self, members: list[_Pending]) -> None:
        documents = {hash: data for member in members for hash, data in member.documents.items()}
        headers = [member.header for member in members]
        # Joining megabytes would block the event loop.
        body = await asyncio.to_thread(pack_batch, headers, documents) if documents else pack_batch(headers, {})
        self._counts["wire/bytes_sent"] += len(body)
        async with self._http.stream("POST", ROUTE, content=body, headers=CONTENT_TYPE) as http_response:
            if http_response.status_code != 200:
                error = (await http_response.aread()).decode(errors="replace")
                refusal = Response(http_response.status_code, {"error": error}, memoryview(b""))
                for member in members:
                    if not member.response.done():
                        member.response.set_result(refusal)
                return
            reader = ResponseReader()
            async for chunk in http_response.aiter_raw():
                for number, response in reader.feed(chunk):
                    if not members[number].response.done():
                        members[number].response.set_result(response)
