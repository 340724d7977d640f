"""Pixels from the image cells of a row, whatever form they have.

    cell ──flatten──▶ sources ──┬─ bytes, PIL image, uint8 array ──────────────▶ decode ──▶ uint8 [H, W, 3]
                                ├─ {bytes, path}, {url}, {image}: their content ─▶ as below
                                └─ text: data URL, http(s) URL, base64, or the path of a file

Decoding is that of the renderer (`vlmrl.rendering.images`): bounded, and fenced. Whatever is wrong with a cell is
`Unusable`, with the reason.

Left out on purpose: audio, and paths inside archives. Videos have videos.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PILImage

from vlmrl.rendering.images import ImageError, Pixels, decode
from vlmrl.tasks.dataset.columns import Unusable, as_list, parsed, plain, short
from vlmrl.tasks.dataset.files import Files, Place

CONTENT_KEYS = (
    "bytes",
    "image",
    "image_url",
    "url",
    "data",
    "base64",
    "path",
    "file",
    "file_name",
    "filename",
    "source",
)
"""Where dictionaries have the image: `{bytes, path}` of `datasets`, `{url}` of OpenAI, `{image}` of TRL and Qwen."""


@dataclass(frozen=True)
class ImageReader:
    """Reads the image cells of one data set. Thread-safe."""

    root: Path | None
    """`task.image_root`; None: paths start at the folder of the row's file."""
    fetch: bool
    """Whether http(s) URLs are downloaded."""
    root_key: str = "task.image_root"
    """The key that sets `root`."""

    def pixels(self, cell: Any, place: Place) -> list[Pixels]:
        """The images of a cell, one after the other; none for None. Raises `Unusable`."""
        return [self._decoded(source, place) for source in flat(cell)]

    def _decoded(self, source: Any, place: Place) -> Pixels:
        if isinstance(source, str):
            source = Files("image", self.root, self.root_key, self.fetch).content(source, place)
        try:
            return decode(source)
        except ImageError as error:
            raise Unusable(f"{error.text}: repair or remove the image") from None


def flat(cell: Any) -> Iterator[Any]:
    """The single images of a cell: bytes, PIL images, arrays and texts. Raises `Unusable` for anything else.

    >>> list(flat([{"bytes": b"1", "path": "a.png"}, [None, "b.png"]])), list(flat("['a.png', 'b.png']"))
    ([b'1', 'b.png'], ['a.png', 'b.png'])
    """
    if cell is None:
        return
    if isinstance(cell, PILImage.Image | bytes):
        yield cell
    elif isinstance(cell, bytearray | memoryview):
        yield bytes(cell)
    elif isinstance(cell, np.ndarray) and cell.dtype != object:
        yield cell
    elif isinstance(cell, str):
        if cell.strip():
            yield from _of_text_cell(cell)
    elif isinstance(cell, Mapping):
        found = next((cell[key] for key in CONTENT_KEYS if cell.get(key) is not None), None)
        if found is None and any(value is not None for value in cell.values()):
            raise Unusable(f"an image is a struct of {', '.join(map(str, cell))}, and none of them is known to hold it")
        yield from flat(found)
    elif isinstance(plain(cell), list | tuple):
        for item in plain(cell):
            yield from flat(item)
    else:
        raise Unusable(f"an image is {short(cell)}, a {type(cell).__name__}: it must be a path, bytes, or a data URL")


def _of_text_cell(text: str) -> Iterator[Any]:
    """A text that spells a list (CSV) is that list."""
    if re.fullmatch(r"\s*\[.*\]\s*", text, re.DOTALL):
        listed = as_list(text)
        if listed != [text]:
            yield from flat(listed)
            return
    if re.fullmatch(r"\s*\{.*\}\s*", text, re.DOTALL) and isinstance(found := parsed(text), Mapping):
        yield from flat(found)
        return
    yield text
