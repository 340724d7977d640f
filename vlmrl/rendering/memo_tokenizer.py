"""The tokenizer as the `renderers` package gets it, with the tokens of recent pieces of text kept."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import Any

from vlmrl.rendering.control_tokens import MARK, ControlTokens

MEMO_PIECES = 4096
"""Pieces of text, and as many of tokens, that are kept: prompts repeat the same pieces."""


class MemoTokenizer:
    """Encodes and decodes through a memo. `control` decides which control tokens in a text are text; None reads them
    all as control tokens.

    It has no `__call__` on purpose: the package would use it to map characters to tokens, which nothing here reads and
    which takes longer than the rest of a render.
    """

    def __init__(
        self, tokenizer: Any, control: ControlTokens | None = None, call_tokens: Collection[int] = frozenset()
    ) -> None:
        """`call_tokens`: special tokens of tool calls, which are part of an answer's text."""
        self.name_or_path: str = tokenizer.name_or_path
        self.unk_token_id: int | None = tokenizer.unk_token_id
        self.eos_token_id: int | None = tokenizer.eos_token_id
        self.convert_tokens_to_ids = lru_cache(maxsize=1024)(tokenizer.convert_tokens_to_ids)

        @lru_cache(maxsize=MEMO_PIECES)
        def encode(text: str, add_special_tokens: bool) -> tuple[int, ...]:
            if control is not None and MARK in text:
                return tuple(control.encode(text))
            ids = tokenizer.encode(text, add_special_tokens=add_special_tokens)
            if control is not None and not control.is_exact(text, ids):
                return tuple(control.encode(text))
            return tuple(ids)

        @lru_cache(maxsize=MEMO_PIECES)
        def decode(token_ids: tuple[int, ...], skip_special_tokens: bool) -> str:
            text: str = tokenizer.decode(
                list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
            )
            return text

        self._encode, self._decode = encode, decode
        self._call_tokens = frozenset(call_tokens)
        self._left_out = frozenset(tokenizer.all_special_ids).difference(call_tokens) if call_tokens else frozenset()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(self._encode(text, add_special_tokens))

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return self._decode(tuple(token_ids), skip_special_tokens)

    def text(self, token_ids: tuple[int, ...]) -> str:
        """The text of token ids, without special tokens, but with those of tool calls."""
        if self._call_tokens.intersection(token_ids):
            return self._decode(tuple(id for id in token_ids if id not in self._left_out), False)
        return self._decode(token_ids, True)
