"""Text of a chat template to token ids, with the images and videos in it.

    "…<|image_pad|>…" ─expand─▶ "…<|image_pad|><|image_pad|><|image_pad|>…" ─encode─▶ ids ─place─▶ placeholders

The replacement of an image or video is put in as text and tokenized together with what is around it. Ids that are
spliced in differ where newlines merge (Gemma 3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from vlmrl.errors import ConfigError
from vlmrl.rendering.control_tokens import MARK, ControlTokens
from vlmrl.types import ContractError, IntArray, MMItem, Modality, Placeholder


class Encoder:
    """Tokenizes what one chat template writes."""

    def __init__(self, tokenizer: Any, processor: Any, feature_ids: Mapping[Modality, int]) -> None:
        """`processor` is None for a text-only model. `feature_ids` are the tokens that get the features of images and
        videos, for the kinds that the model takes. Raises `ConfigError`."""
        self._tokenizer = tokenizer
        self._processor = processor
        self._feature_ids = feature_ids
        self.written: dict[Modality, str] = {kind: getattr(processor, f"{kind}_token") for kind in feature_ids}
        """What the template writes in place of an item of each kind."""
        self.control: ControlTokens | None = None
        """Set once the control tokens are known; None reads all that a text spells as control tokens."""
        self._begin = _added_by(processor, tokenizer) if processor is not None else ()
        self._added = np.zeros(1 + max(tokenizer.get_vocab().values()), np.bool_)
        self._added[list(tokenizer.added_tokens_decoder)] = True

    # ── text ────────────────────────────────────────────────────────────────────────────────────────────────

    def expand(self, text: str, items: Sequence[MMItem]) -> str:
        """The text with the replacement of each image and video in place of its placeholder. Raises `ContractError`
        where there are more or fewer placeholders."""
        replacements: dict[str, list[str]] = {}
        for kind, written in self.written.items():
            own = [item.replacement for item in items if item.modality == kind]
            if (found := text.count(written)) != len(own):
                raise ContractError(
                    f"{len(own)} {kind}s went into the chat template and {found} came out: check whether it allows "
                    f"{kind}s in messages of that role, and that no text spells the {kind} token"
                )
            if own:
                replacements[f"{kind}s_replacements"] = own
        if not replacements:
            return text
        made, _ = self._processor.get_text_with_replacements([text], **replacements)
        return str(made[0])

    def count(self, text: str) -> int:
        """How many images and videos stand in what the template wrote."""
        return sum(text.count(written) for written in self.written.values())

    def begin(self, text: str) -> tuple[int, ...]:
        """The tokens that the tokenizer itself puts before `text`: none where the template has written them."""
        bos = self._tokenizer.bos_token
        return () if bos is not None and text.startswith(bos) else self._begin

    # ── tokens ──────────────────────────────────────────────────────────────────────────────────────────────

    def encode(self, text: str) -> list[int]:
        """The tokens of a text with marks."""
        if self.control is not None and MARK in text:
            return self.control.encode(text)
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        if self.control is not None and not self.control.is_exact(text, ids):
            return self.control.encode(text)
        return ids

    def encode_whole(self, text: str, items: Sequence[MMItem]) -> list[int]:
        """The tokens of a whole conversation, whose placeholders are not expanded yet."""
        return [*self.begin(text), *self.encode(self.expand(text, items))]

    def encode_after(self, token: int, text: str) -> list[int]:
        """The tokens of a text that follows `token`. What was there before stays as it is: a text is tokenized from its
        border on, together with the control token before it where there is one, which some tokenizers need to know
        that no word begins there."""
        if not self.is_added(token):
            return self.encode(text)
        ids = self.encode(self._tokenizer.convert_ids_to_tokens(token) + text)
        return ids[1:] if ids and ids[0] == token else self.encode(text)

    def encode_parts(self, parts: Sequence[str]) -> list[list[int]]:
        """The tokens of each part of a text. They are tokenized together, or apart where a token would reach over the
        border of two parts: there a prompt ends and an answer begins."""
        text = "".join(parts)
        if MARK not in text and self._tokenizer.is_fast:
            encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            ids, starts = encoded["input_ids"], np.array([start for start, _ in encoded["offset_mapping"]], np.int64)
            ends = np.array([end for _, end in encoded["offset_mapping"]], np.int64)
            borders = np.cumsum([len(part) for part in parts])[:-1]
            if ids == self.encode(text) and not any(np.any((starts < b) & (ends > b)) for b in borders):
                cuts = [0, *(int(np.searchsorted(starts, border)) for border in borders), len(ids)]
                return [ids[a:b] for a, b in pairwise(cuts)]
        made: list[list[int]] = []
        for part in parts:
            last = next((each[-1] for each in reversed(made) if each), None)
            made.append(self.encode(part) if last is None else self.encode_after(last, part))
        return made

    def is_added(self, token: int) -> bool:
        """Whether a token is special or was added to the tokenizer: text around it does not merge with it."""
        return token < len(self._added) and bool(self._added[token])

    def added_in(self, token_ids: IntArray) -> frozenset[int]:
        """The added tokens among `token_ids`."""
        known = token_ids[token_ids < len(self._added)]
        return frozenset(np.unique(known[self._added[known]]).tolist())

    # ── placeholders ────────────────────────────────────────────────────────────────────────────────────────

    def place(self, ids: Sequence[int], items: Sequence[MMItem], offset: int) -> tuple[Placeholder, ...]:
        """The placeholders of `items` in `ids`, which stand from token `offset` on: from the first to the last image
        (video) token of each, with gaps where other tokens stand between them. Raises `ContractError`."""
        given = np.asarray(ids, np.int64)
        remaining: dict[Modality, IntArray] = {}
        for kind, id in self._feature_ids.items():
            remaining[kind] = np.flatnonzero(given == id)
            expected = sum(item.num_tokens for item in items if item.modality == kind)
            if len(remaining[kind]) != expected:
                raise ContractError(
                    f"{len(remaining[kind])} {kind} tokens but {expected} placeholder positions: a message's text must "
                    f"not spell the {kind} token"
                )
        placeholders = []
        for item in items:
            own, rest = np.split(remaining[item.modality], [item.num_tokens])
            remaining[item.modality] = rest
            jumps = np.flatnonzero(np.diff(own) > 1)
            gaps = tuple((int(own[at] + 1 - own[0]), int(own[at + 1] - own[at] - 1)) for at in jumps)
            length = int(own[-1] - own[0]) + 1
            placeholders.append(Placeholder(offset + int(own[0]), length, item.hash, gaps, item.modality))
        return tuple(placeholders)


def _added_by(processor: Any, tokenizer: Any) -> tuple[int, ...]:
    """The tokens that the processor puts before a text that it is given. Raises `ConfigError` for one that appends."""
    try:
        ids = list(processor(text=["a"])["input_ids"][0])
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"the processor {type(processor).__name__} takes no text without an image ({error}), so it puts images "
            "where no chat template does: choose a renderer that knows the family"
        ) from error
    plain = tokenizer.encode("a", add_special_tokens=False)
    begin = len(ids) - len(plain)
    if begin < 0 or ids[begin:] != plain:
        raise ConfigError(
            f"the processor {type(processor).__name__} writes more than the text that it is given "
            f"({tokenizer.decode(ids)!r} for 'a'), so a prompt could not be continued token by token: choose a "
            "renderer that knows the family"
        )
    return tuple(ids[:begin])
