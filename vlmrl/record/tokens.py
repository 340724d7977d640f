"""tokens.jsonl: the spelling of every token in rollouts/, each once, so that no tokenizer is needed to read them.

    {"id":17,"text":" red"}
    {"id":201,"text":"Ģ"}          a token that is not a whole character is spelled as in the vocabulary
    {"id":258,"text":"<|im_end|>"}

Lines are appended. Readers skip a half-written last line, and a resumed run removes it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import orjson

from vlmrl.record.files import disk_errors
from vlmrl.record.lines import read_lines

log = logging.getLogger(__name__)


class TokenSpellings:
    """Appends tokens that are not in the file yet."""

    def __init__(self, path: Path, tokenizer: Any) -> None:
        """`tokenizer` is a tokenizer of transformers. Raises VlmrlError where the file cannot be written."""
        self._path = path
        self._tokenizer = tokenizer
        self._known: set[int] = set()
        if path.exists():
            with disk_errors(path):
                self._known = set(read_spellings(path))
                content = path.read_bytes()
                os.truncate(path, content.rfind(b"\n") + 1)  # remove a half-written last line

    def add(self, token_ids: Iterable[int]) -> None:
        """Append the new ones of `token_ids`. Raises VlmrlError where the file cannot be written."""
        new = sorted(set(token_ids) - self._known)
        if self._known and not self._path.exists():  # it was removed under the run: write all of it again
            new = sorted({*new, *self._known})
        if not new:
            return
        lines = (orjson.dumps({"id": id, "text": self._spell(id)}, option=orjson.OPT_APPEND_NEWLINE) for id in new)
        with disk_errors(self._path), self._path.open("ab") as file:
            file.write(b"".join(lines))
        self._known.update(new)

    def _spell(self, token_id: int) -> str:
        text = self._tokenizer.decode([token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if text and "\N{REPLACEMENT CHARACTER}" not in text:
            return str(text)
        return str(self._tokenizer.convert_ids_to_tokens(token_id))


def read_spellings(path: Path, warn: Callable[[str], None] = log.warning) -> dict[int, str]:
    """Read token id → text. A damaged line is skipped; `warn` is called with a sentence about it. Raises OSError."""
    return {record["id"]: record["text"] for _, _, record in read_lines(path, _is_spelling, warn)}


def _is_spelling(content: Any) -> bool:
    return isinstance(content, dict) and type(content.get("id")) is int and isinstance(content.get("text"), str)
