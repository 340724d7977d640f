"""A scripted policy that reads small prints: it zooms, looks at the result, and answers."""

from __future__ import annotations

import numpy as np

from vlmrl import Message
from vlmrl.rendering.images import decode
from vlmrl.types import Image

CALL = '<tool_call>\n{"name": "zoom", "arguments": {"image": 1, "box": [125, 125, 375, 375]}}\n</tool_call>'
EVEN = np.tile(np.array([[1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 1, 0], [1, 0, 0, 1]], bool), (16, 16))
LETTERS = {(1, -1, -1): "R", (-1, 1, -1): "G", (-1, -1, 1): "B", (1, 1, 1): "W"}


def read(messages: tuple[Message, ...]) -> str:
    """The next answer of a policy that reads."""
    shown = [part for message in messages for part in message.content if isinstance(part, Image)]
    if len(shown) < 2:
        return CALL
    print_64 = decode(shown[-1].source)[2::4, 2::4].astype(int)  # the zoom made four pixels of each
    difference = print_64[EVEN].mean(0) - print_64[~EVEN].mean(0)
    return LETTERS[tuple(np.sign(difference).astype(int))]


def blind(messages: tuple[Message, ...]) -> str:
    """Answers at once, and calls what there is not."""
    called = sum(message.role == "tool" for message in messages)
    return '<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call>' if called == 0 else "R"
