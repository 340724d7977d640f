"""The images of a report's page: each distinct one once, as a data URL, reduced where it is large."""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import PIL.Image

from vlmrl.record.files import read_small
from vlmrl.record.run_dir import RunDir

log = logging.getLogger(__name__)

MAX_IMAGE_SIDE = 512
"""Pixels. A larger image is reduced; the original is in images/."""
DAMAGED_IMAGE = (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError)
"""What PIL raises for a damaged PNG."""
LOSSLESS_BYTES = 64 * 2**10
"""An image of at most this size is embedded unchanged."""


@dataclass(eq=False)
class Pictures:
    """The images of a page. Each distinct one is encoded once."""

    encoded: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Hash → the entry of `images` in the document."""

    def of(self, run_dir: RunDir, hashes: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Entries of the images that the run directory has."""
        found = {}
        for hash in hashes:
            if hash not in self.encoded and run_dir.image(hash).exists():
                try:
                    self.encoded[hash] = encode(run_dir.image(hash))
                except DAMAGED_IMAGE as error:
                    log.warning("%s cannot be read, so the page shows no such image: %s", run_dir.image(hash), error)
            if hash in self.encoded:
                found[hash] = self.encoded[hash]
        return found


def encode(path: Path) -> dict[str, Any]:
    """The entry of an image: the file itself, or a reduced JPEG if it is large. Raises OSError."""
    data, kind = read_small(path), "png"
    with PIL.Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
        width, height = picture.size
        if whole := len(data) <= LOSSLESS_BYTES and max(width, height) <= MAX_IMAGE_SIDE:
            pass
        else:
            picture.thumbnail((MAX_IMAGE_SIDE, MAX_IMAGE_SIDE))
            small = io.BytesIO()
            picture.convert("RGB").save(small, "JPEG", quality=88, subsampling=0)  # WebP would take ten times as long
            data, kind = small.getvalue(), "jpeg"
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return {"src": source, "width": width, "height": height, "whole": whole}
