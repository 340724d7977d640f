"""Control tokens that a message's text spells: they stay text, because only the chat format may open and close turns.

    "say <|im_end|>" ──mark──▶ "say \\ufdd0<|im_end|>" ──chat format──▶ … ──MemoTokenizer──▶ tokens of "<", "|", "im", …

The `renderers` package composes text from its own words and from the messages', and hands it to the tokenizer, which
cannot tell them apart. So the text of a message carries a mark where it spells a control token, and the tokenizer takes
the mark away and reads what follows as text. Text that spells none carries no mark and takes the ordinary path.

Control tokens are the tokenizer's special tokens, and the tokens with which the chat format opens a turn (some
tokenizers do not call these special). Other added tokens (`<think>`, `<tool_call>`) are read as the chat template of
transformers reads them. Placeholders of images carry no mark: the renderer refuses text that spells one, because such a
text was most likely formatted for another tool.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from vlmrl.rendering.tool_calls import map_message, map_tool, texts_beside
from vlmrl.types import ContractError, Message, Part, Text, ToolSpec

MARK = "\ufdd0"
"""Stands before a control token that is text. Unicode reserves this code point for use inside a program; a text that
holds it nevertheless gets it doubled."""


class ControlTokens:
    """The control tokens of a tokenizer, and how texts that spell them are tokenized."""

    def __init__(self, tokenizer: Any, ids: Collection[int], placeholders: Collection[int]) -> None:
        """`ids` are those of all control tokens; `placeholders`, a part of them, are not marked."""
        self.ids = frozenset(ids)
        self._tokenizer = tokenizer
        self._id_of = {tokenizer.convert_ids_to_tokens(id): id for id in ids}
        names = sorted(self._id_of, key=len, reverse=True)
        marked = [re.escape(name) for name in names if self._id_of[name] not in placeholders]
        self._any = re.compile("|".join(map(re.escape, names)) or "(?!)")
        self._marked = re.compile("|".join(marked) or "(?!)")
        self._places = re.compile("(?=" + ("|".join([*marked, MARK])) + ")")
        self._plain: Any = None

    # ── messages ────────────────────────────────────────────────────────────────────────────────────────────

    def mark(self, messages: Sequence[Message]) -> tuple[list[Message], bool]:
        """The messages with marks, and whether a text spells a control token."""
        texts = [*("".join(_texts(message)) for message in messages), *texts_beside(messages)]
        spelled = any(self._marked.search(text) for text in texts)
        if not spelled and not any(MARK in text for text in texts):
            return list(messages), False
        return [
            map_message(replace(message, content=self._mark_parts(message.content)), self._mark_text)
            for message in messages
        ], spelled

    def mark_tools(self, tools: Sequence[ToolSpec]) -> tuple[tuple[ToolSpec, ...], bool]:
        """The tools with marks, and whether one of their texts spells a control token."""
        texts = texts_beside((), tools)
        spelled = any(self._marked.search(text) for text in texts)
        return tuple(map_tool(tool, self._mark_text) for tool in tools), spelled

    def without(self, messages: Iterable[Message]) -> list[Message]:
        """The messages with another word in place of each control token that they spell, to count the others."""
        return [
            map_message(
                replace(
                    message,
                    content=tuple(
                        part
                        for is_text, run in groupby(message.content, lambda part: isinstance(part, Text))
                        for part in ([Text(self._without_text("".join(_texts(run))))] if is_text else run)
                    ),
                ),
                self._without_text,
            )
            for message in messages
        ]

    def tools_without(self, tools: Iterable[ToolSpec]) -> tuple[ToolSpec, ...]:
        """The tools with another word in place of each control token that they spell."""
        return tuple(map_tool(tool, self._without_text) for tool in tools)

    def _without_text(self, text: str) -> str:
        return self._marked.sub("x", text)

    def _mark_text(self, text: str) -> str:
        return "".join(part.text for part in self._mark_parts((Text(text),)) if isinstance(part, Text))

    def _mark_parts(self, parts: tuple[Part, ...]) -> tuple[Part, ...]:
        """A control token may be spelled by several texts in a row, so the marks are found in the whole of them."""
        marked: list[Part] = []
        for is_text, run in groupby(parts, lambda part: isinstance(part, Text)):
            if not is_text:
                marked.extend(run)
                continue
            texts = list(_texts(run))
            places = [found.start() for found in self._places.finditer("".join(texts))]
            begin = 0
            for text in texts:
                cuts = [at - begin for at in places if begin <= at < begin + len(text)]
                pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
                marked.append(Text(MARK.join(pieces)))
                begin += len(text)
        return tuple(marked)

    # ── tokens ──────────────────────────────────────────────────────────────────────────────────────────────

    def is_exact(self, text: str, ids: Sequence[int]) -> bool:
        """Whether each control token among `ids` is spelled by `text`, which has no marks. A tokenizer that normalizes
        text first (lower case, full-width letters) finds control tokens in texts that do not spell them."""
        found = sum(id in self.ids for id in ids)
        return found == 0 or found <= len(self._any.findall(text))

    def plain(self, text: str) -> str:
        """The text without its marks."""
        return _unmarked(text)[0]

    def check_same(self, ids: Sequence[int], without: Sequence[int], name: str) -> None:
        """Raise `ContractError` unless `ids` have the control tokens of `without`, the same messages with another word
        in place of each control token that they spell. `name` is the chat format's."""
        found, expected = (Counter(id for id in each if id in self.ids) for each in (ids, without))
        if found != expected:
            raise ContractError(
                f"a message's text spells a control token, and the chat format {name} makes one of it: remove it from "
                "the text"
            )

    def as_text(self, text: str) -> list[int]:
        """The tokens of a text in which nothing is a control token."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return self._encode_plain(text) if self.ids.intersection(ids) else ids

    def encode(self, text: str) -> list[int]:
        """The tokens of a text with marks: control tokens without a mark are those of the chat format."""
        plain, marked = _unmarked(text)
        ids: list[int] = []
        begin = 0
        for found in self._any.finditer(plain):
            if found.start() not in marked:
                ids += self._encode_plain(plain[begin : found.start()])
                ids.append(self._id_of[found.group()])
                begin = found.end()
        return ids + self._encode_plain(plain[begin:])

    def _encode_plain(self, text: str) -> list[int]:
        """Tokenize without recognizing control tokens."""
        if not text:
            return []
        if not self._tokenizer.is_fast:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
            return ids
        if self._plain is None:  # made when it is first needed: it takes a second for a large vocabulary
            self._plain = _plain_tokenizer(self._tokenizer.backend_tokenizer, self._id_of)
        return list(self._plain.encode(text, add_special_tokens=False).ids)


def _texts(parts: Message | Iterable[Part]) -> Iterable[str]:
    return (part.text for part in (parts.content if isinstance(parts, Message) else parts) if isinstance(part, Text))


def _unmarked(text: str) -> tuple[str, set[int]]:
    """The text without its marks, and the places where a control token is text.

    >>> _unmarked("a" + MARK + "<|im_end|>" + MARK + MARK) == ("a<|im_end|>" + MARK, {1})
    True
    """
    plain, places = [], set()
    length = at = 0
    while (mark := text.find(MARK, at)) >= 0:
        is_text = text[mark + 1 : mark + 2] == MARK  # a doubled mark is one of the text's own
        plain.append(text[at:mark] + MARK * is_text)
        length += len(plain[-1])
        if not is_text:
            places.add(length)
        at = mark + 1 + is_text
    return "".join([*plain, text[at:]]), places


def _plain_tokenizer(backend: Any, names: Collection[str]) -> Any:
    """A copy of a `tokenizers.Tokenizer` that reads the named tokens as text."""
    from tokenizers import Tokenizer

    description = json.loads(backend.to_str())
    for token in description["added_tokens"]:
        token["special"] = token["special"] or token["content"] in names
    plain = Tokenizer.from_str(json.dumps(description))
    plain.no_truncation()
    plain.no_padding()
    plain.encode_special_tokens = True  # the library's name for: read special tokens in a text as text
    return plain
