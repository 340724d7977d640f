"""The HTTP server of the endpoint, one per run, on loopback.

    POST /session/<id>/v1/chat/completions     the session of the base URL
    POST /v1/chat/completions                  the session of the header X-Session-ID, or the lobby's choice
    GET  …/v1/models

A session's key opens this session and no other. Every request ends: the headers and the body of a request have a time
limit, and the body a size limit. A client that leaves while its answer is sampled costs nothing else: the turn is kept.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, Protocol

import orjson
from aiohttp import web

from vlmrl.orchestrator.endpoint import answers
from vlmrl.orchestrator.endpoint.media import DataMedia
from vlmrl.orchestrator.endpoint.refusal import RefusedError
from vlmrl.orchestrator.endpoint.request import ChatRequest, read_request
from vlmrl.orchestrator.endpoint.session import ChatSession

log = logging.getLogger(__name__)

HOST = "127.0.0.1"

MAX_BODY_BYTES = 256 << 20
"""Largest body of a request: about 60 photos of 3 MB in base64."""

HEADER_PATIENCE_S = 60.0
"""How long a connection may be open before the headers of its (next) request are complete."""

BODY_PATIENCE_S = 60.0
"""How long a body may take after its headers."""

LARGE_BODY_BYTES = 1 << 20
"""Larger bodies are parsed in a thread, so that other requests go on."""

CLOSE_PATIENCE_S = 1.0
"""How long `stop` waits for responses that are being written."""


@dataclass(frozen=True)
class SessionAddress:
    """Where a program finds its session: the values of OPENAI_BASE_URL and OPENAI_API_KEY."""

    id: str
    """As in the base URL, and as the header X-Session-ID names it."""
    base_url: str
    api_key: str


class Lobby(Protocol):
    """Serves requests that name no session of a rollout (mode=serve)."""

    key: str

    async def session(self, name: str | None, request: ChatRequest) -> ChatSession:
        """The session of a request; `name` is its header X-Session-ID. Raises `RefusedError`."""
        ...


@dataclass(frozen=True, eq=False)
class _Open:
    session: ChatSession
    key: str


class Endpoint:
    """Serves the open sessions. Use it in one event loop."""

    def __init__(
        self,
        model: str,
        *,
        temperature: float,
        port: int = 0,
        lobby: Lobby | None = None,
        max_body_bytes: int = MAX_BODY_BYTES,
        header_patience_s: float = HEADER_PATIENCE_S,
        body_patience_s: float = BODY_PATIENCE_S,
    ) -> None:
        """`model` is the name in the answers; `port` 0 takes a free one; `temperature` as for `read_request`. The
        sessions say whether a client's sampling is taken; at the `lobby` it is."""
        self.model = model
        self.port = port
        self.media = DataMedia()
        self.failure: asyncio.Future[None] | None = None
        """Gets the error that ends the run, such as an engine that is gone or a bug."""
        self._temperature = temperature
        self._lobby = lobby
        self._max_body_bytes = max_body_bytes
        self._header_patience_s, self._body_patience_s = header_patience_s, body_patience_s
        self._open: dict[str, _Open] = {}
        self._counts: Counter[str] = Counter()
        self._http: web.Server | None = None
        self._listener: asyncio.Server | None = None
        self._waiting: dict[Any, asyncio.TimerHandle] = {}
        """Connection → when it is closed unless a request comes."""

    @property
    def base_url(self) -> str:
        """The base URL of requests that name no session."""
        return f"http://{HOST}:{self.port}/v1"

    async def start(self) -> None:
        """Listen. Raises OSError where the port is taken."""
        loop = asyncio.get_running_loop()
        self.failure = loop.create_future()
        self._http = web.Server(self._serve, access_log=None, logger=_quiet_logger(self._counts))
        self._listener = await loop.create_server(self._connected, HOST, self.port, backlog=1024)
        self.port = self._listener.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Stop listening and close every connection. May be called twice."""
        if self._listener is None or self._http is None:
            return
        self._listener.close()
        for timer in self._waiting.values():
            timer.cancel()
        self._waiting.clear()
        for each in self._open.values():
            each.session.close()
        self._open.clear()
        await self._http.shutdown(CLOSE_PATIENCE_S)
        await self._listener.wait_closed()
        self._listener = None
        if any(counts := self.metrics().values()):
            log.warning(
                "requests that belong to no session: %d without the right key, %d that are no HTTP, %d not finished in "
                "time",
                *counts,
            )
        if self.failure is not None and not self.failure.done():
            self.failure.cancel()

    def open(self, session: ChatSession) -> SessionAddress:
        """Serve a session until it is closed."""
        for id in [id for id, each in self._open.items() if each.session.is_closed]:
            del self._open[id]
        id, key = secrets.token_hex(8), f"vlmrl-{secrets.token_urlsafe(24)}"
        self._open[id] = _Open(session, key)
        return SessionAddress(id, f"http://{HOST}:{self.port}/session/{id}/v1", key)

    def metrics(self) -> dict[str, float]:
        """Requests since the last call that belong to no session: `endpoint/denied` (no key, or a wrong one),
        `endpoint/malformed` (no HTTP) and `endpoint/timed_out` (not finished in time)."""
        counts = {f"endpoint/{name}": float(self._counts[name]) for name in ("denied", "malformed", "timed_out")}
        self._counts.clear()
        return counts

    # ── connections ─────────────────────────────────────────────────────────────────────────────────────────

    def _connected(self) -> Any:
        assert self._http is not None
        protocol = self._http()
        self._await_request(protocol)
        return protocol

    def _await_request(self, protocol: Any) -> None:
        """Close a connection unless the headers of a request come in time."""

        def give_up() -> None:
            self._waiting.pop(protocol, None)
            if protocol.transport is not None:
                self._counts["timed_out"] += 1
                protocol.transport.abort()

        self._waiting[protocol] = asyncio.get_running_loop().call_later(self._header_patience_s, give_up)

    async def _serve(self, http: web.BaseRequest) -> web.StreamResponse:
        timer = self._waiting.pop(http.protocol, None)
        if timer is not None:
            timer.cancel()
        try:
            return await self._respond(http)
        finally:
            if self._listener is not None and http.protocol.transport is not None:
                self._await_request(http.protocol)

    async def _respond(self, http: web.BaseRequest) -> web.StreamResponse:
        try:
            return await self._route(http)
        except RefusedError as error:
            response = _json(error.body(), error.status)
            if not http.content.is_eof():  # a body that is too large or too slow is not read to its end
                response.force_close()
            return response
        except (ConnectionError, asyncio.CancelledError):
            raise
        except Exception as error:
            log.exception("the endpoint failed")
            if self.failure is not None and not self.failure.done():
                self.failure.set_exception(error)
            return _json(RefusedError("the run failed, and ends", status=500).body(), 500)

    # ── requests ────────────────────────────────────────────────────────────────────────────────────────────

    async def _route(self, http: web.BaseRequest) -> web.StreamResponse:
        id, what = _parsed_path(http.path)
        find = self._authorized(http, id)
        if what == "models":
            if http.method != "GET":
                raise RefusedError(f"{http.method} is not served here: use GET", status=405)
            return _json(answers.models(self.model))
        if http.method != "POST":
            raise RefusedError(f"{http.method} is not served here: use POST", status=405)
        try:
            client_samples = find.client_samples if isinstance(find, ChatSession) else True
            request = await self._read(http, client_samples=client_samples)
        except RefusedError as error:
            if isinstance(find, ChatSession):
                find.refuse(error)
            raise
        session = (
            find if isinstance(find, ChatSession) else await find.session(http.headers.get("X-Session-ID"), request)
        )
        if id is not None and (lane := http.headers.get("X-Session-ID")):
            request = replace(request, lane=lane)
        answer = await session.answer(request)
        if not request.stream:
            return _json(answers.response(answer, request, self.model))
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        await response.prepare(http)
        for event in answers.events(answer, request, self.model):
            await response.write(event)
        await response.write_eof()
        return response

    def _authorized(self, http: web.BaseRequest, id: str | None) -> ChatSession | Lobby:
        """The session that a request may use, or the lobby. An unknown session and a wrong key look the same."""
        scheme, _, key = http.headers.get("Authorization", "").partition(" ")
        found = self._open.get(id or http.headers.get("X-Session-ID") or "")
        expected = found.key if found is not None else ""
        if id is None and found is None and self._lobby is not None:
            expected = self._lobby.key
        is_right = hmac.compare_digest(key.strip().encode(), expected.encode())
        if not expected or not is_right or scheme.lower() != "bearer":
            self._counts["denied"] += 1
            raise RefusedError(
                "this key does not open this session: send it as Authorization: Bearer <key>", status=401
            )
        if found is not None:
            return found.session
        assert self._lobby is not None
        return self._lobby

    async def _read(self, http: web.BaseRequest, *, client_samples: bool) -> ChatRequest:
        """The request in a body. Raises `RefusedError`."""
        limit = self._max_body_bytes
        too_large = RefusedError(f"the body is larger than {limit} bytes: send smaller images and videos", status=413)
        if (http.content_length or 0) > limit:
            raise too_large
        if http.headers.get("Expect", "").lower() == "100-continue" and http.transport is not None:
            http.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")  # curl waits a second for it before a large body
        body = bytearray()
        try:
            async with asyncio.timeout(self._body_patience_s):
                async for chunk in http.content.iter_any():
                    body += chunk
                    if len(body) > limit:
                        raise too_large
        except TimeoutError:
            raise RefusedError(f"the body did not come within {self._body_patience_s:g} s", status=408) from None
        except web.RequestPayloadError as error:
            raise RefusedError(f"the body cannot be read: {error}") from None
        if len(body) > LARGE_BODY_BYTES:
            return await asyncio.to_thread(self._parse, bytes(body), client_samples)
        return self._parse(bytes(body), client_samples)

    def _parse(self, body: bytes, client_samples: bool) -> ChatRequest:
        try:
            value = orjson.loads(body)
        except orjson.JSONDecodeError as error:
            raise RefusedError(f"the body is no JSON: {error}") from None
        return read_request(value, self.media, client_samples=client_samples, temperature=self._temperature)


def _parsed_path(path: str) -> tuple[str | None, str]:
    """(session id, `models` or `completions`). Raises `RefusedError`.

    >>> _parsed_path("/session/ab12/v1/chat/completions"), _parsed_path("/v1/models")
    (('ab12', 'completions'), (None, 'models'))
    """
    parts = path.strip("/").split("/")
    id = None
    if len(parts) > 2 and parts[0] == "session":
        id, parts = parts[1], parts[2:]
    match parts:
        case ["v1", "chat", "completions"]:
            return id, "completions"
        case ["v1", "models"]:
            return id, "models"
        case _:
            raise RefusedError(
                f"{path[:100]} is not served: POST …/v1/chat/completions and GET …/v1/models are", status=404
            )


def _json(value: dict[str, Any], status: int = 200) -> web.Response:
    return web.Response(body=answers.to_bytes(value), status=status, content_type="application/json")


class _CountMalformed(logging.Handler):
    """Counts the malformed requests of which aiohttp would log a traceback each; passes on all other errors."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self._counts = counts

    def emit(self, record: logging.LogRecord) -> None:
        if str(record.msg).startswith("Error handling request"):
            self._counts["malformed"] += 1
        elif record.levelno >= logging.ERROR:
            log.handle(record)


def _quiet_logger(counts: Counter[str]) -> logging.Logger:
    logger = logging.Logger("vlmrl.endpoint.http", logging.DEBUG)
    logger.addHandler(_CountMalformed(counts))
    return logger
