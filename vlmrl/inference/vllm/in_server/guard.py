"""Middleware of the servers that the run starts: every endpoint but `/health` requires the run's API key. It also adds
the run's own endpoint (route.py).

vLLM checks its API key only for `/v1` and `/inference`. Without this middleware, every user of the machine could call
the endpoints that replace the weights or run methods of the workers.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Awaitable, Callable

from vlmrl.inference.vllm.in_server.route import Receive, Route, Scope, Send


class RequireKey:
    """ASGI middleware (`--middleware vlmrl.inference.vllm.in_server.guard.RequireKey`); the key is `VLLM_API_KEY`."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._app = Route(app)
        self._expected = f"Bearer {os.environ['VLLM_API_KEY']}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] == "/health":
            return await self._app(scope, receive, send)
        given = dict(scope["headers"]).get(b"authorization", b"")
        if secrets.compare_digest(given, self._expected):
            return await self._app(scope, receive, send)
        await send({"type": "http.response.start", "status": 401, "headers": [(b"content-type", b"application/json")]})
        await send({"type": "http.response.body", "body": b'{"error": "this server is another run\'s"}'})
        return None
