"""Tokens of an image, by Qwen-VL's processor, and the constants of episode.py's formula. Imports nothing heavy: the
checks of every start use it."""

from __future__ import annotations

import math

TOKEN_PIXELS = 32
"""Pixels per side of one image token of Qwen3-VL: patches of 16, merged 2 by 2."""

IMAGE_FRAME, TURN_FRAME, CHARACTERS_PER_TOKEN, TINY_CHARACTERS_PER_TOKEN = 2, 10, 4, 2


def vision_tokens(width: int, height: int, bounds: tuple[int, int]) -> int:
    """Tokens of an image under Qwen-VL's processor, which keeps its area within `bounds` pixels.

    >>> vision_tokens(32, 32, (32 * 32, 1024 * 1024)), vision_tokens(32, 32, (256 * 256, 4096 * 4096))
    (1, 64)
    >>> vision_tokens(448, 448, (256 * 256, 4096 * 4096)), vision_tokens(1000, 600, (256 * 256, 4096 * 4096))
    (196, 589)
    """
    unit, (least, most) = TOKEN_PIXELS, bounds
    rounded = [round(side / unit) * unit for side in (height, width)]
    if math.prod(rounded) > most:
        scale = math.sqrt(height * width / most)
        rounded = [max(unit, math.floor(side / scale / unit) * unit) for side in (height, width)]
    elif math.prod(rounded) < least:
        scale = math.sqrt(least / (height * width))
        rounded = [math.ceil(side * scale / unit) * unit for side in (height, width)]
    return math.prod(rounded) // unit**2
