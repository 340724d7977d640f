"""Token ids as text in which control tokens can be seen, and each image is one word."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vlmrl.types import Prompt


@dataclass(frozen=True)
class Piece:
    """A part of a prompt."""

    kind: str
    """`text`, `control` or `image`."""
    text: str


def pieces_of(prompt: Prompt, tokenizer: Any) -> list[Piece]:
    """The prompt in order. Each run of placeholder tokens is one piece, `<image: 4 tokens, 64 × 64>`."""
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    sizes = {image.hash: image for image in prompt.images}
    pieces: list[Piece] = []
    ids = prompt.token_ids.tolist()
    at = 0
    for placeholder in prompt.placeholders:
        pieces += _text(ids[at : placeholder.offset], special, tokenizer)
        image = sizes[placeholder.hash]
        width, height = image.processed_size or (image.pixels.shape[1], image.pixels.shape[0])
        pieces.append(Piece("image", f"<image: {placeholder.length} tokens, {width} × {height}>"))
        at = placeholder.offset + placeholder.length
    return pieces + _text(ids[at:], special, tokenizer)


def _text(ids: list[int], special: set[int], tokenizer: Any) -> list[Piece]:
    pieces: list[Piece] = []
    run: list[int] = []
    for token in [*ids, None]:
        if token is not None and token not in special:
            run.append(token)
            continue
        if run:
            pieces.append(Piece("text", tokenizer.decode(run)))
            run = []
        if token is not None:
            pieces.append(Piece("control", tokenizer.decode([token])))
    return pieces
