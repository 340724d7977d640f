"""Token ids as text in which control tokens can be seen, and each image or video is one word."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from vlmrl.types import ImageItem, MMItem, Prompt, VideoItem


@dataclass(frozen=True)
class Piece:
    """A part of a prompt."""

    kind: str
    """`text`, `control`, `image` or `video`."""
    text: str


def pieces_of(prompt: Prompt, tokenizer: Any, start: int = 0) -> list[Piece]:
    """The prompt in order, from token `start` on. Each placeholder is one piece, `<image: 4 tokens, 64 × 64>` or
    `<video: 24 tokens, 8 frames of 64 × 64>`, with the times that some families write between the frames."""
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    pieces: list[Piece] = []
    ids = prompt.token_ids.tolist()
    at = start
    for placeholder, item in zip(prompt.placeholders, prompt.mm_items, strict=True):
        if placeholder.offset < start:
            continue
        pieces += _text(ids[at : placeholder.offset], special, tokenizer)
        kind = item.modality
        pieces.append(Piece(kind, f"<{kind}: {placeholder.num_features} tokens, {_size(item)}>"))
        at = placeholder.offset + placeholder.length
    return pieces + _text(ids[at:], special, tokenizer)


def _size(item: MMItem) -> str:
    """The size that the policy sees, where the family tells it."""
    pixels = item.pixels if isinstance(item, ImageItem) else item.frames[0]
    width, height = item.processed_size or (pixels.shape[1], pixels.shape[0])
    frames = f"{len(item.frames)} frames of " if isinstance(item, VideoItem) else ""
    return f"{frames}{width} × {height}"


def control_spellings(tokenizer: Any) -> re.Pattern[str]:
    """What only a control token, an image or a video looks like in the pieces of a prompt."""
    names = {*tokenizer.all_special_tokens, *map(str, tokenizer.added_tokens_decoder.values())}
    spelled = sorted((re.escape(name) for name in names if len(name) > 1), key=len, reverse=True)
    return re.compile("|".join([*spelled, r"<(?:image|video): \d+ tokens"]))


def broken_spelling(text: str, spellings: re.Pattern[str]) -> str:
    r"""A text of the data, in which a backslash follows the first character of whatever spells a control token.

    >>> broken_spelling("end<|im_end|> <|im_end|", re.compile(r"<\|im_end\|>"))
    'end<\\|im_end|> <|im_end|'
    """
    return spellings.sub(lambda found: f"{found[0][0]}\\{found[0][1:]}", text)


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
