"""tokens.jsonl: the spelling of every token in rollouts/, each once, so that no tokenizer is needed to read them.

    {"id":17,"text":" red"}
    {"id":201,"text":"Ģ"}          a token that is not a whole character is spelled as in the vocabulary
    {"id":258,"text":"<|im_end|>"}

Lines are appended. Readers skip a half-written last line, and a resumed run removes it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import orjson

from vlmrl.record.files import disk_errors


class TokenSpellings:
    """Appends tokens that are not in the file yet."""

    def __init__(self, path: Path, tokenizer: Any) -> None:
        """`tokenizer` is a tokenizer of transformers. Raises VlmrlError where the file cannot be written."""
        self._path = path
        self._tokenizer = tokenizer
        self._known: set[int] = set()
        if path.exists():
            self._known = set(read_spellings(path))
            lines = path.read_bytes().splitlines(keepends=True)
            if lines and not lines[-1].endswith(b"\n"):
                with disk_errors(path):
                    path.write_bytes(b"".join(lines[:-1]))

    def add(self, token_ids: Iterable[int]) -> None:
        """Append the new ones of `token_ids`. Raises VlmrlError where the file cannot be written."""
        new = sorted(set(token_ids) - self._known)
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


def read_spellings(path: Path) -> dict[int, str]:
    """Read token id → text. Raises OSError."""
    lines = (line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n"))
    return {record["id"]: record["text"] for record in map(orjson.loads, lines)}
