"""Requests to an OpenAI-compatible endpoint: `POST <url>/chat/completions`, with retries, limits and a cache on disk.

    request ─▶ cached reply? ─▶ send ─▶ 200: text of the first choice
                                  ├─ 408, 409, 429, 5xx, timeout, lost connection, not JSON ─▶ wait, send again
                                  └─ redirect, another status, too large ─▶ JudgeError

The key is sent to the configured URL and nowhere else: redirects are not followed. It is removed from every text that
leaves this file, since an endpoint may repeat it in an error or a reply.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import random
import ssl
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from vlmrl.config.reward import JudgeTerm
from vlmrl.config.secrets import HIDDEN, redacted_text
from vlmrl.errors import ConfigError, headline
from vlmrl.models.checkpoints.built_folders import cache_folder
from vlmrl.rewards.base import RewardError

if TYPE_CHECKING:
    import httpx

_JITTER = random.Random()  # not the global generator, whose state belongs to the run

log = logging.getLogger(__name__)

LARGEST_REPLY_BYTES = 4 * 2**20
"""Larger replies are not read to their end."""

FIRST_WAIT_S = 0.5
"""Seconds before the first retry; doubled for each one after it, with a random part against retries in step."""

LONGEST_WAIT_S = 60.0
"""Seconds before a retry at most, also where `Retry-After` says more."""

RETRIED = frozenset({408, 409, 425, 429})
"""HTTP statuses, besides 5xx, after which the same request may succeed."""

QUOTED_CHARACTERS = 300
"""Characters of an endpoint's error that a message quotes."""


class JudgeError(RewardError):
    """The judge gave no reply."""


class _TransientError(Exception):
    """A failure after which the request is sent again."""

    def __init__(self, text: str, wait_s: float | None = None) -> None:
        super().__init__(text)
        self.wait_s = wait_s
        """Seconds that the endpoint asks for."""


class JudgeClient:
    """Sends requests. Holds the key, which no attribute that is printed or recorded contains."""

    def __init__(self, term: JudgeTerm, key: str) -> None:
        self._term = term
        self._url = f"{term.url.rstrip('/')}/chat/completions"
        self._api_key = _api_key(term, key)
        self._cache = cache_folder() / "judge" if term.cache else None

    def __repr__(self) -> str:
        return f"JudgeClient({self._url!r})"

    async def ask(self, content: list[dict[str, Any]], parse: Callable[[str], float]) -> tuple[float, bool]:
        """The value that `parse` finds in the reply to a user message, and whether the reply was cached. Raises
        `JudgeError` where there is no reply. A reply in which `parse` finds nothing is not cached."""
        body = {
            "model": self._term.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self._term.max_tokens,
            "temperature": self._term.temperature,
            **self._term.extra_body,
        }
        sent = json.dumps({name: value for name, value in body.items() if value is not None}).encode()
        place = self._place(sent)
        if (known := _read(place)) is not None:
            return parse(known), True
        text = self._without_key(await self._send_until_answered(sent))
        value = parse(text)
        _write(place, text)
        return value, False

    async def _send_until_answered(self, sent: bytes) -> str:
        import httpx

        # One client per request: a client belongs to one event loop, and a judge takes longer than a handshake.
        timeout = httpx.Timeout(self._term.timeout_s)
        async with httpx.AsyncClient(verify=_tls(), timeout=timeout, follow_redirects=False) as client:
            for attempt in range(self._term.retries + 1):
                try:
                    return await self._send(client, sent)
                except _TransientError as error:
                    if attempt == self._term.retries:
                        raise JudgeError(f"the judge gave no reply in {attempt + 1} requests: {error}") from None
                    await asyncio.sleep(_wait_s(attempt, error.wait_s))
        raise AssertionError("unreachable")

    async def _send(self, client: httpx.AsyncClient, sent: bytes) -> str:
        """One request. Raises `_TransientError` and `JudgeError`."""
        import httpx

        headers = {"Content-Type": "application/json"}
        if self._api_key:
            headers["Authorization"] = f"Bearer {self._api_key}"
        try:
            # httpx limits the time between two bytes; an endpoint that sends one every second would never end.
            async with (
                asyncio.timeout(self._term.timeout_s),
                client.stream("POST", self._url, content=sent, headers=headers) as response,
            ):
                return self._read_reply(response, await _body(response))
        except (TimeoutError, httpx.TimeoutException):
            raise _TransientError(f"none came within {self._term.timeout_s:g} s") from None
        except (httpx.TransportError, httpx.DecodingError) as error:
            raise _TransientError(self._without_key(headline(error))) from None
        except httpx.InvalidURL as error:
            raise JudgeError(f"the judge's url cannot be used: {self._without_key(headline(error))}") from None

    def _read_reply(self, response: httpx.Response, body: bytes) -> str:
        status = response.status_code
        if status != 200:
            words = self._quoted(body)
            if response.is_redirect:
                target = self._without_key(response.headers.get("location", "nowhere"))
                raise JudgeError(
                    f"the judge redirects to {target}, which is not followed: set url to it if it is right"
                )
            if status in RETRIED or status >= 500:
                raise _TransientError(f"HTTP status {status}{words}", _retry_after(response.headers))
            raise JudgeError(f"the judge refuses the request with HTTP status {status}{words}")
        try:
            return _text(json.loads(body))
        except (ValueError, LookupError, TypeError, RecursionError):
            raise _TransientError(f"the reply is not a chat completion in JSON{self._quoted(body)}") from None

    def _quoted(self, body: bytes) -> str:
        text = " ".join(self._without_key(body.decode("utf-8", "replace")).split())
        return f" ({text[:QUOTED_CHARACTERS]})" if text else ""

    def _without_key(self, text: str) -> str:
        if self._api_key:
            for spelling in {self._api_key, json.dumps(self._api_key)[1:-1], quote(self._api_key, safe="")}:
                text = text.replace(spelling, HIDDEN)
        return redacted_text(text)

    def _place(self, sent: bytes) -> Path | None:
        """The file of a request's reply. The request has no key in it."""
        if self._cache is None:
            return None
        name = hashlib.sha256(self._url.encode() + b"\n" + sent).hexdigest()
        return self._cache / name[:2] / f"{name}.json"


def _api_key(term: JudgeTerm, key: str) -> str | None:
    if term.api_key_env is None:
        return None
    value = os.environ.get(term.api_key_env, "").strip()
    if not value:
        raise ConfigError(
            f"{key}.api_key_env={term.api_key_env}: this environment variable is not set, so the judge would refuse "
            f"every request: export {term.api_key_env}, or set {key}.api_key_env=null for an endpoint without a key"
        )
    if not value.isascii() or not value.isprintable() or " " in value:
        raise ConfigError(
            f"{key}.api_key_env={term.api_key_env}: the value of this environment variable has characters that no HTTP "
            "header may have, so no request could be sent: export the key alone"
        )
    return value


async def _body(response: httpx.Response) -> bytes:
    body = bytearray()
    async for piece in response.aiter_bytes():
        body += piece
        if len(body) > LARGEST_REPLY_BYTES:
            raise JudgeError(f"the judge's reply is larger than {LARGEST_REPLY_BYTES // 2**20} MiB")
    return bytes(body)


def _text(reply: Any) -> str:
    """The text of the first choice; a list of parts is joined."""
    content = reply["choices"][0]["message"]["content"]
    if isinstance(content, list):
        content = "".join(part["text"] for part in content if part.get("type") == "text")
    if not isinstance(content, str):
        raise TypeError
    return content


def _retry_after(headers: Mapping[str, str]) -> float | None:
    try:
        return float(headers.get("retry-after", ""))
    except ValueError:  # a date, or nothing
        return None


def _wait_s(attempt: int, asked: float | None) -> float:
    backoff = FIRST_WAIT_S * 2.0**attempt * _JITTER.uniform(1, 1.5)
    return max(0.0, min(LONGEST_WAIT_S, max(backoff, asked or 0.0)))


@cache
def _tls() -> ssl.SSLContext:
    """Made once: reading the certificates takes about 20 ms."""
    import httpx

    return httpx.create_ssl_context()


def _read(place: Path | None) -> str | None:
    """A cached reply; None where there is none that can be read."""
    if place is None:
        return None
    try:
        return str(json.loads(place.read_text(encoding="utf-8"))["reply"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _write(place: Path | None, reply: str) -> None:
    """Store a reply, whole or not at all. A cache that cannot be written costs money, not the run."""
    if place is None:
        return
    scratch = None
    try:
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=place.parent, delete=False, encoding="utf-8") as file:
            scratch = Path(file.name)
            json.dump({"reply": reply}, file)
        scratch.replace(place)
    except OSError as error:
        log.warning("The judge's replies cannot be cached: %s", headline(error))
        if scratch is not None:
            with suppress(OSError):
                scratch.unlink()
