"""Weights of a checkpoint that vLLM does not hold, because they change no feature of an image."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

LAYER = re.compile(r"(.*vision.*?\.layers)\.(\d+)\.")
"""The name of a weight in a list of layers of a vision tower."""


def layer_counts(parameters: Iterable[str]) -> dict[str, int]:
    """Prefix of each list of layers → how many layers this worker has of it.

    >>> layer_counts(["vision.encoder.layers.0.w", "vision.encoder.layers.1.w", "head.weight"])
    {'vision.encoder.layers': 2}
    """
    counts: dict[str, int] = {}
    for name in parameters:
        if found := LAYER.match(name):
            counts[found[1]] = max(counts.get(found[1], 0), int(found[2]) + 1)
    return counts


def is_behind_last_layer(name: str, counts: Mapping[str, int]) -> bool:
    """Whether a weight of a vision tower comes after the layer whose output is used, so that it changes no feature.
    LLaVA takes the output of the last layer but one; vLLM does not even make the last one, nor the norm behind it.

    >>> counts = {"vision.encoder.layers": 2}
    >>> names = ("vision.encoder.layers.1.w", "vision.encoder.layers.2.w", "vision.post_layernorm.bias", "vision.w")
    >>> [is_behind_last_layer(name, counts) for name in names]
    [False, True, True, False]
    """
    if found := LAYER.match(name):
        return 0 < counts.get(found[1], 0) <= int(found[2])
    tower, _, rest = name.partition(".post_layernorm.")
    return bool(rest) and f"{tower}.encoder.layers" in counts
