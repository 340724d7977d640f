"""Between our records and those of the `renderers` package.

Images go to the package as stand-ins: a tiny picture whose pixels spell the image's hash. The image processor that the
package gets (processors.py) reads the hash and returns what was processed before. So a render never decodes, hashes or
processes pixels, and nothing in the package is patched.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from functools import lru_cache
from typing import Any

from PIL import Image as PILImage

from vlmrl.rendering.tool_calls import fields_key, message_fields, tools_key
from vlmrl.types import Image, Message, MMItem, Prompt, Text, ToolSpec, Video


def shown_in(messages: Iterable[Message]) -> list[Image | Video]:
    """The images and videos of a conversation, in order."""
    return [part for message in messages for part in message.content if not isinstance(part, Text)]


def content_key(messages: Iterable[Message], items: Iterable[MMItem], tools: Sequence[ToolSpec] = ()) -> Hashable:
    """A key that is equal for equal roles, texts, pixels, tool calls and tools. `items` are the processed images of the
    messages.

    A text stands for itself, an image is the 1-tuple of its hash.
    """
    hashes = iter([(item.hash,) for item in items])
    return tools_key(tools), tuple(
        (
            message.role,
            tuple(part.text if isinstance(part, Text) else next(hashes) for part in message.content),
            fields_key(message),
        )
        for message in messages
    )


def to_package(messages: Iterable[Message], items: Iterable[MMItem]) -> list[dict[str, Any]]:
    """The package's messages, with a stand-in for each image. A message without images becomes one string, which every
    family accepts."""
    remaining = iter(items)
    converted: list[dict[str, Any]] = []
    for message in messages:
        content: list[dict[str, Any]] | str = [
            {"type": "text", "text": part.text}
            if isinstance(part, Text)
            else {"type": "image", "image": stand_in(next(remaining).hash)}
            for part in message.content
        ]
        if all(isinstance(part, Text) for part in message.content):
            content = "".join(part["text"] for part in content if isinstance(part, dict))
        converted.append({"role": message.role, "content": content, **message_fields(message)})
    return converted


def images_to_package(prompt: Prompt) -> Any:
    """The package's `MultiModalData` of a prompt; None for a prompt without images."""
    from renderers import MultiModalData, PlaceholderRange

    if not prompt.images:
        return None
    return MultiModalData(
        mm_hashes={"image": [image.hash for image in prompt.images]},
        mm_placeholders={"image": [PlaceholderRange(p.offset, p.length) for p in prompt.placeholders]},
        mm_items={"image": [dict(image.mm_kwargs) for image in prompt.images]},
    )


@lru_cache(maxsize=4096)
def stand_in(image_hash: str) -> PILImage.Image:
    """A picture of 11 × 1 pixels whose 33 bytes are the hash (32 ASCII characters) and one byte of padding."""
    return PILImage.frombytes("RGB", (11, 1), image_hash.encode() + b"\0")


def hash_of_stand_in(picture: PILImage.Image) -> str:
    """The hash that a stand-in spells.

    >>> hash_of_stand_in(stand_in("4d7fc975f0b1832b9a3356b0492f265a"))
    '4d7fc975f0b1832b9a3356b0492f265a'
    """
    return picture.tobytes()[:32].decode()
