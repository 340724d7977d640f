"""Images and videos from http(s) URLs, downloaded once and kept on disk.

    url ──▶ ~/.cache/vlmrl/{images,videos}/<sha256 of url> ── there? ──▶ bytes
                                                  └─ no: httpx, at most MAX_BYTES in TIMEOUT_S ──▶ written, then bytes

Only a run with `task.fetch=true` comes here. A data set from a hub must not make this machine call services of its own
network (a cloud's metadata address, an intranet), so its URLs may not lead to private addresses. No redirect may lead
from a public address to a private one.

Left out on purpose: retries, cookies and logins.
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
import socket
import tempfile
import threading
import time
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urljoin, urlsplit

from vlmrl.models.checkpoints.built_folders import cache_folder
from vlmrl.rendering.images import lock_of
from vlmrl.tasks.dataset.columns import Unusable, short
from vlmrl.types import Modality

if TYPE_CHECKING:
    import httpx

MAX_BYTES = 64 << 20
"""A larger file is not downloaded to its end."""

TIMEOUT_S = 60.0
"""Seconds that one file may take, redirects included."""

SILENCE_S = 20.0
"""Seconds without a byte after which a server counts as gone."""

MAX_REDIRECTS = 5


def fetched(url: str, *, allow_private: bool, kind: Modality = "image") -> bytes:
    """The content of a URL, from the cache where it is there. Raises `Unusable`."""
    path = cache_folder() / f"{kind}s" / hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()
    with lock_of(("fetch", str(path))):
        try:
            return path.read_bytes()
        except FileNotFoundError:
            pass
        except OSError as error:
            raise Unusable(f"the downloaded {kind} {path} cannot be read ({error.strerror}): remove it") from None
        content = _downloaded(url, allow_private, f"the {kind} {short(url)}")
        _keep(path, content)
        return content


def _keep(path: Path, content: bytes) -> None:
    """Write a file whole or not at all. A full disk only costs another download."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.replace(name, path)
        except OSError:
            os.unlink(name)
    except OSError:
        return


def _downloaded(url: str, allow_private: bool, what: str) -> bytes:
    import httpx

    deadline = time.monotonic() + TIMEOUT_S
    at, allowed = url, allow_private
    try:
        for _ in range(MAX_REDIRECTS + 1):
            is_private = _check_address(what, at, allowed)
            allowed = allowed and is_private  # once outside, no way back in
            with _client().stream("GET", at) as response:
                if response.is_redirect and "location" in response.headers:
                    at = urljoin(at, response.headers["location"])
                    continue
                if not response.is_success:
                    raise Unusable(f"{what} cannot be downloaded: HTTP status {response.status_code}")
                return _body(what, response, deadline)
        raise Unusable(f"{what} cannot be downloaded: more than {MAX_REDIRECTS} redirects")
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise Unusable(f"{what} cannot be downloaded ({reason})") from None


def _body(what: str, response: httpx.Response, deadline: float) -> bytes:
    content = bytearray()
    for chunk in response.iter_bytes():
        content += chunk
        if len(content) > MAX_BYTES:
            raise Unusable(f"{what} has more than {MAX_BYTES >> 20} MiB: download and shrink it")
        if time.monotonic() > deadline:
            raise Unusable(f"{what} was not downloaded within {TIMEOUT_S:g} seconds")
    return bytes(content)


def _check_address(what: str, at: str, allow_private: bool) -> bool:
    """Whether the host of `at` is in a private network. Raises `Unusable` where that, or the kind of URL, is not
    allowed."""
    parts = urlsplit(at)
    if parts.scheme.lower() not in ("http", "https") or not parts.hostname:
        raise Unusable(f"{what} leads to {short(at)}, which is no http(s) URL")
    addresses = {info[4][0] for info in socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_STREAM)}
    is_private = not all(ipaddress.ip_address(str(address).partition("%")[0]).is_global for address in addresses)
    if is_private and not allow_private:
        raise Unusable(
            f"{what} leads to {parts.hostname}, an address of this machine or its network, which "
            "remote data may not call: download the files yourself"
        )
    return is_private


_CLIENT_LOCK = threading.Lock()


def _client() -> httpx.Client:
    with _CLIENT_LOCK:
        return _made_client(os.getpid())


@cache
def _made_client(process: int) -> httpx.Client:
    """One client per process, which keeps connections open."""
    import httpx

    timeout = httpx.Timeout(SILENCE_S)
    return httpx.Client(timeout=timeout, follow_redirects=False, headers={"User-Agent": "vlmrl (image download)"})
