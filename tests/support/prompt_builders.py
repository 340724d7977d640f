"""Prompts that are written token by token, with images of 1 and 4 tokens; no renderer and no pixels."""

from __future__ import annotations

import numpy as np

from vlmrl.types import ImageItem, Placeholder, Prompt

IMAGE, END, PAD = 99, 1, 0


def image(tokens: int) -> ImageItem:
    return ImageItem(f"hash-{tokens}", np.zeros((1, 1, 3), np.uint8), {}, tokens)


IMAGES = [image(1), image(4)]


def extended(prompt: Prompt, token_ids: list[int], images: list[ImageItem]) -> Prompt:
    """`prompt`, then `token_ids`, then each image's run with a `PAD` after it."""
    ids, placeholders = [*prompt.token_ids.tolist(), *token_ids], list(prompt.placeholders)
    for item in images:
        placeholders.append(Placeholder(len(ids), item.num_tokens, item.hash))
        ids += [IMAGE] * item.num_tokens + [PAD]
    return Prompt(np.array(ids, np.int64), tuple(placeholders), (*prompt.images, *images))


EMPTY = Prompt(np.zeros(0, np.int64), (), ())
