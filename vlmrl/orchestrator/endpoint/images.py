"""Images of chat requests. A client sends every image of a conversation again with each request, as a data URL: each
distinct URL is decoded from base64 once and becomes one `Image` part, so that its pixels are decoded and hashed once.

Left out on purpose: URLs of web servers and files (a rollout must not depend on a web server, and a program must not
read the files of the run).
"""

from __future__ import annotations

import base64
import binascii
import hashlib

from vlmrl.caches.lru import ByteLRU
from vlmrl.orchestrator.endpoint.refusal import RefusedError
from vlmrl.types import Image

RECENT_BYTES = 256 << 20
"""Encoded images that are kept: those that were used last."""


class DataImages:
    """`Image` parts by their data URLs. Thread-safe."""

    def __init__(self) -> None:
        self._parts: ByteLRU[bytes, Image] = ByteLRU(RECENT_BYTES, keep_newest=True)

    def part(self, url: str, param: str) -> Image:
        """The image of a data URL; equal URLs give the same part. Raises `RefusedError`, which names `param`.

        >>> images = DataImages()
        >>> images.part("data:image/png;base64,iVBORw==", "url") is images.part("data:image/png;base64,iVBORw==", "url")
        True
        """
        header, comma, data = url.partition(",")
        if not header.startswith("data:"):
            raise RefusedError(
                f"{param} is no data URL, and images are not fetched: send it as data:image/png;base64,…", param=param
            )
        if not comma or not header.endswith(";base64"):
            raise RefusedError(
                f"{param} is not encoded in base64: send it as data:image/png;base64,…", param=param, code="bad_image"
            )
        key = hashlib.blake2b(data.encode(), digest_size=16).digest()
        part = self._parts.get(key)
        if part is None:
            try:
                source = base64.b64decode("".join(data.split()), validate=True)  # some encoders break lines
            except (binascii.Error, ValueError) as error:
                raise RefusedError(
                    f"{param} is no valid base64 ({error}): encode the bytes of the image file",
                    param=param,
                    code="bad_image",
                ) from None
            part = Image(source)
            self._parts.put(key, part, len(source))
        return part
