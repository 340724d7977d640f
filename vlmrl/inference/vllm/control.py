"""The HTTP connection to one launch of one vLLM server: health, signs of life, and control calls.

The key goes with every request but `/health`, which is sent while a server starts. A server that hangs is *given up*:
every request in flight, and every later one, raises `ServerLostError`. It is given up by its own control calls, which
have a deadline, and by `progress.watch`.

There are two errors. After a `ServerLostError` (the connection broke, the server is dying, or it hangs) the same
request can succeed on another server. After an `EngineError` (an error response) it would fail again.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Generator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import orjson

from vlmrl.errors import EngineError
from vlmrl.inference.vllm.connections import Connections, is_own
from vlmrl.inference.vllm.frames import ROUTE

KEEPALIVE_S = 2.0
"""How long an idle connection is kept. The server closes it after five seconds; a request on a connection that the
server is closing would be lost."""

HEALTH_TIMEOUT_S = 5.0

TOKENS = ("vllm:generation_tokens_total{", "vllm:prompt_tokens_total{")
"""Beginnings of the lines of `GET /metrics` that count tokens. Both versions of vLLM count after every step."""


class ServerLostError(Exception):
    """The server dropped the request, is dying, or hangs. Another server, or this one after a restart, can answer
    it."""


class ControlClient:
    """The connection to one launch of one server; a restarted server gets a new one. Belongs to one event loop."""

    def __init__(
        self,
        name: str,
        url: str,
        api_key: str | None,
        counts: Counter[str],
        request_timeout_s: float,
        transport: httpx.AsyncBaseTransport | None = None,
        unix_socket: Path | None = None,
    ) -> None:
        """`counts` are the engine's counters by metric; `transport` replaces the network in tests. With `unix_socket`,
        the server is on this machine, and `url` is only a name for it."""
        self.name = name
        self.url = url
        self.timeout_s = request_timeout_s
        self.given_up = asyncio.Event()
        """Set by `give_up`."""
        self.is_paused = False
        """Whether this client has paused the server, so that it generates no tokens."""
        self.reason = ""
        """Why the server was given up."""
        self._counts = counts
        self._unix_socket = unix_socket
        self._is_own = unix_socket is None
        self._waiting: set[asyncio.Timeout] = set()
        """The requests in flight."""
        self._http = httpx.AsyncClient(
            base_url=url,
            auth=_Key(api_key),
            timeout=httpx.Timeout(None, connect=request_timeout_s),
            trust_env=False,  # ignore proxy settings: servers are reached directly
            transport=transport or Connections(KEEPALIVE_S, unix_socket),
        )

    async def close(self) -> None:
        await self._http.aclose()

    async def is_healthy(self) -> bool:
        """Whether the server answers and its engine is alive. The request does not contain the key, because it is sent
        while a server starts. Raises `EngineError` where another user has made the server's socket."""
        try:
            if not self._is_own:
                assert self._unix_socket is not None
                self._is_own = await is_own(self._unix_socket)
                if not self._is_own:
                    raise EngineError(f"{self.name}: another user listens on {self._unix_socket}")
            return (await self._http.get("/health", timeout=HEALTH_TIMEOUT_S, auth=None)).status_code == 200
        except (httpx.TransportError, OSError):
            return False

    async def accepts_key(self) -> bool:
        """Whether the server takes this client's key. Raises `ServerLostError`."""
        return (await self._send_in_time("GET", ROUTE)).status_code != 401

    async def pulse(self) -> float | None:
        """Wait for a sign of life of all workers → the number of tokens that the server has processed so far; None for
        a server that does not count them.

        The engine answers between two of its steps, and computes nothing for it, so this does not compete with
        requests. Raises `ServerLostError` and `EngineError`.
        """
        await self.call_workers("vlmrl_settings")
        response = await self._send_in_time("GET", "/metrics")
        counts = [float(line.rpartition(" ")[2]) for line in response.text.splitlines() if line.startswith(TOKENS)]
        return sum(counts) if counts else None

    async def call(self, method: str, path: str, *, optional: bool = False, **arguments: Any) -> Any:
        """Call a control endpoint → its JSON; None if an `optional` endpoint does not exist.

        `arguments` are httpx's `json` and `params`. A server that does not answer within `timeout_s` is given up.
        Raises `ServerLostError`, and `EngineError` for any other failure.
        """
        response = await self._send_in_time(method, path, **arguments)
        if response.status_code == 404 and optional:
            return None
        if response.status_code != 200:
            await self._raise_if_dying(response.status_code, complaint(response))
            raise EngineError(f"{self.name} answered {method} {path} with {complaint(response)}")
        if path in ("/pause", "/resume"):
            self.is_paused = path == "/pause"
        return orjson.loads(response.content) if response.content else {}

    async def call_workers(self, method: str, **arguments: Any) -> list[Any]:
        """Call `method` on every worker → what each returned. Raises `ServerLostError` and `EngineError`."""
        answer = await self.call("POST", "/collective_rpc", json={"method": method, "kwargs": arguments})
        results: list[Any] = answer["results"]
        return results

    def give_up(self, reason: str) -> None:
        """The server hangs: let every request in flight, and every later one, raise `ServerLostError`. Only the first
        call has an effect."""
        if self.given_up.is_set():
            return
        self._counts["inference/timeouts"] += 1
        self.reason = reason
        self.given_up.set()
        for timeout in self._waiting:
            timeout.reschedule(0.0)

    async def _send_in_time(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        """Send a request that takes no longer than `timeout_s`, or give the server up."""
        try:
            async with asyncio.timeout(self.timeout_s):
                return await self._send(method, path, **arguments)
        except TimeoutError:
            self.give_up(f"did not answer {method} {path} within inference.request_timeout_s={self.timeout_s:g}")
            raise ServerLostError(f"{self.name} {self.reason}") from None

    async def _send(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        try:
            async with self._unless_given_up():
                return await self._http.request(method, path, **arguments)
        except httpx.TransportError as error:
            raise ServerLostError(f"{self.name}: {type(error).__name__} {error}") from error

    @asynccontextmanager
    async def _unless_given_up(self) -> AsyncIterator[None]:
        """Raise `ServerLostError` inside when the server is given up, however long it takes otherwise."""
        if self.given_up.is_set():
            raise ServerLostError(f"{self.name} {self.reason}")
        timeout = asyncio.timeout(None)
        try:
            async with timeout:
                self._waiting.add(timeout)
                try:
                    yield
                finally:
                    self._waiting.discard(timeout)
        except TimeoutError:
            if not timeout.expired():
                raise
            raise ServerLostError(f"{self.name} {self.reason}") from None

    async def _raise_if_dying(self, status: int, complaint: str) -> None:
        """Raise `ServerLostError` if the server's engine has died: such a server answers once more before it ends."""
        if status >= 500 and not await self.is_healthy():
            raise ServerLostError(f"{self.name}: {complaint}")


class _Key(httpx.Auth):
    """Adds the server's key to a request."""

    def __init__(self, api_key: str | None) -> None:
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        request.headers.update(self._headers)
        yield request


def complaint(response: httpx.Response) -> str:
    """The status and vLLM's error message."""
    try:
        body = orjson.loads(response.content)
        error = body.get("error", body)
        text = str(error.get("message", error) if isinstance(error, dict) else error)
    except (orjson.JSONDecodeError, AttributeError):
        text = response.text
    return f"HTTP {response.status_code}: {text[:500]}"
