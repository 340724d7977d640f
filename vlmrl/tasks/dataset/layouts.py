"""Which column of a data set plays which part, recognized by the names and types of the columns.

    columns, a few rows ──▶ candidates per role, best names first ──▶ do two of equal rank say the same? ──▶ Layout
                                                                       no: refused, with the key that decides

column_names.py holds the names of the layouts that are in use. Upper and lower case and `-`, `_` do not count.

A role that `task.columns.<role>` sets is not recognized. Nothing goes by the name of a data set.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlmrl.config.dataset import ColumnsConfig
from vlmrl.errors import ConfigError
from vlmrl.tasks.dataset.agreement import same_answer, same_question, same_text, same_videos
from vlmrl.tasks.dataset.column_kinds import folded, holds_image, is_conversation, is_video, names_videos, shown_type
from vlmrl.tasks.dataset.column_names import (
    ANSWERS,
    BOXES,
    CHOICES,
    CHOSEN,
    IMAGES,
    MESSAGES,
    PROMPTS,
    REJECTED,
    ROLE_KEYS,
    SYSTEM,
    VIDEOS,
)
from vlmrl.tasks.dataset.columns import is_missing, leaves, nearest, short, unwrapped, value_at
from vlmrl.tasks.dataset.rows import ColumnType

_OPTION_NAME = re.compile(r"(?:option|choice)?_?([a-h])")
_NUMBERED_IMAGE = re.compile(r"(?:image|img)_?(\d+)")


@dataclass(frozen=True)
class Layout:
    """Which column plays which part. A column is its name or a dotted path; None: no column does."""

    prompt: str | None = None
    """The question as text."""
    messages: str | None = None
    """A conversation, or a prompt that is a list of messages."""
    images: tuple[str, ...] = ()
    videos: tuple[str, ...] = ()
    answer: str | None = None
    choices: tuple[str, ...] = ()
    """One column with a list, or a column per option."""
    system: str | None = None
    boxes: str | None = None
    demonstration: str | None = None
    input: str | None = None
    """Alpaca's `input`, which stands below the instruction."""
    history: str | None = None
    """Earlier turns of a text prompt, as pairs of question and answer (alpaca)."""
    chosen: str | None = None
    """The better answer of a pair."""
    rejected: str | None = None
    """The worse answer of a pair."""
    passed_over: tuple[tuple[str, str], ...] = ()
    """Role and column of what was not taken, because another name has a higher rank or says the same."""

    def table(self, columns: Mapping[str, ColumnType]) -> dict[str, str]:
        """Role → its columns with their types, for the screen.

        >>> Layout(prompt="question", answer="solution").table({"question": ColumnType("text")})
        {'prompt': 'question (text)', 'images': 'none', 'answer': 'solution'}
        """
        table: dict[str, str] = {}
        for role in ROLES:
            value = getattr(self, role)
            names = [value] if isinstance(value, str) else list(value or ())
            if names or role in ("images", "answer"):
                kinds = [f"{name} ({shown_type(columns[name], role)})" if name in columns else name for name in names]
                others = [column for of, column in self.passed_over if of == role]
                table[role] = (", ".join(kinds) or "none") + (f"; not {', '.join(others)}" if others else "")
        return table


ROLES = [
    *("messages", "prompt", "input", "history", "system", "images", "videos", "choices", "boxes", "answer"),
    *("demonstration", "chosen", "rejected"),
]
"""The roles of a layout, in the order in which the screen shows them."""


def recognize(
    columns: Mapping[str, ColumnType],
    wanted: ColumnsConfig,
    rows: Sequence[Mapping[str, Any]],
    *,
    needs_prompt: bool,
    prefix: str = "task",
    same_images: Callable[[str, str], bool],
) -> Layout:
    """The layout of a data set. Raises ConfigError where a column that is set does not exist, where two readings differ
    on `rows`, and where `needs_prompt` and no column holds a question.

    `same_images` tells whether two columns show the same pixels on the rows looked at.
    """
    search = _Search(columns, wanted, rows, prefix, same_images)
    layout = search.layout()
    if needs_prompt and layout.prompt is None and layout.messages is None:
        raise ConfigError(
            f"{prefix}.columns.prompt is not set, and no column is known to hold the question, so there is nothing to "
            f"ask: the columns are {', '.join(columns)}: set {prefix}.columns.prompt or {prefix}.template"
        )
    return layout


@dataclass
class _Search:
    """One recognition."""

    columns: Mapping[str, ColumnType]
    wanted: ColumnsConfig
    rows: Sequence[Mapping[str, Any]]
    prefix: str
    same_images: Callable[[str, str], bool]

    def __post_init__(self) -> None:
        self.passed_over: list[tuple[str, str]] = []
        self.taken = {
            str(path)
            for value in dataclasses.asdict(self.wanted).values()
            for path in (value if isinstance(value, list | tuple) else [value])
        }
        self.by_name: dict[str, str] = {}
        for column in self.columns:
            self.by_name.setdefault(folded(column), column)

    def layout(self) -> Layout:
        prompt, messages = self._prompt()
        choices = self._several("choices", self._choices)
        answer = self._answer(choices)
        parts = self._alpaca(prompt)
        videos = self._several("videos", self._videos)
        self.taken.update(videos)
        chosen = self._one("chosen", CHOSEN, same_text)
        rejected = self._one("rejected", REJECTED, same_text)
        if prompt is None and messages is None and chosen is not None and self._is_conversation(chosen):
            messages = chosen
        demonstration = self._set("demonstration")
        if demonstration is None and answer is None and rejected is not None:
            demonstration = chosen
        return Layout(
            prompt=prompt,
            messages=messages,
            images=self._several("images", self._images),
            videos=videos,
            answer=answer,
            choices=choices,
            system=self._one("system", SYSTEM, same_text),
            boxes=self._one("boxes", BOXES, same_text),
            demonstration=demonstration,
            input=parts.get("input"),
            history=parts.get("history"),
            chosen=chosen,
            rejected=rejected,
            passed_over=tuple(self.passed_over),
        )

    # ── roles ───────────────────────────────────────────────────────────────────────────────────────────────

    def _prompt(self) -> tuple[str | None, str | None]:
        """The columns of `prompt` and of `messages`; one of them at most."""
        prompt, messages = self._set("prompt"), self._set("messages")
        if messages is not None and prompt is not None:
            raise ConfigError(
                f"{self.prefix}.columns has prompt={prompt} and messages={messages}, and each is the question: set one"
            )
        if messages is not None:
            return None, messages
        if prompt is not None:
            return (None, prompt) if self._is_conversation(prompt) else (prompt, None)
        chats = [name for names in MESSAGES for name in self._known(names) if self._is_conversation(name)]
        asked = self._known(PROMPTS[0])
        chats += [name for name in asked if self._is_conversation(name)]
        if chats:
            found = self._agreed("messages", chats, same_question)
            self.passed_over.extend(("messages", name) for name in asked if name not in chats)
            return None, found
        texts = self._first(PROMPTS, lambda name: self.columns[name].kind not in ("bytes", "struct"))
        return self._agreed("prompt", texts, same_question), None

    def _is_conversation(self, path: str) -> bool:
        """Whether a column holds lists of messages, by its type, or by its values where JSON tells no type."""
        kind = self._type_at(path)
        if kind is not None and kind.kind == "list" and kind.item is not None and kind.item.kind == "struct":
            return any(set(keys) <= set(kind.item.fields) for keys in ROLE_KEYS)
        if kind is not None and kind.kind not in ("list", "mixed", "text"):
            return False
        values = [value for row in self.rows if not is_missing(value := value_at(row, path))]
        return bool(values) and all(is_conversation(value) for value in values)

    def _alpaca(self, prompt: str | None) -> dict[str, str]:
        """`input` and `history` next to `instruction` (alpaca) or `query` (ms-swift)."""
        if prompt is None or self.wanted.prompt is not None:
            return {}
        found: dict[str, str] = {}
        if folded(prompt) == "instruction" and "input" in self.by_name:
            found["input"] = self.by_name["input"]
        if folded(prompt) in ("instruction", "query") and "history" in self.by_name:
            found["history"] = self.by_name["history"]
        return found

    def _answer(self, choices: tuple[str, ...]) -> str | None:
        if (found := self._set("answer")) is not None:
            return found

        def fits(path: str) -> bool:
            kind = self._type_at(path)
            return kind is None or kind.kind not in ("bytes", "null")

        ranked = [[path for path in self._known(names) if fits(path)] for names in ANSWERS]
        certain = self._agreed("answer", ranked[0], same_answer)
        if certain is not None:
            self.passed_over.extend(("answer", path) for path in ranked[1])
            return certain
        if ranked[1]:
            # A solution that only states an answer competes with the column of the answer; one with reasons does not.
            competing = (path for path in ranked[2] if folded(path) == "solution" and path not in self.taken)
            stating = [path for path in competing if self._states_answers(path)]
            self.passed_over.extend(("answer", path) for path in ranked[2] if path not in stating)
            options = bool(choices)
            return self._agreed("answer", ranked[1] + stating, lambda a, b: options or same_answer(a, b))
        return self._agreed("answer", ranked[2], same_answer)

    def _states_answers(self, path: str) -> bool:
        values = [value for row in self.rows if not is_missing(value := value_at(row, path))]
        return bool(values) and all(len(unwrapped(str(value))) <= 40 for value in values)

    def _choices(self) -> tuple[str, ...]:
        named = self._first(CHOICES, lambda name: self.columns[name].kind in ("list", "text", "struct", "mixed"))
        if named:
            found = self._agreed("choices", named, same_text)
            return () if found is None else (found,)
        letters = {
            letter[1]: column
            for name, column in self.by_name.items()
            if (letter := _OPTION_NAME.fullmatch(name)) and column not in self.taken
        }
        count = next(number for number, letter in enumerate("abcdefghi") if letter not in letters)
        return tuple(letters[letter] for letter in "abcdefgh"[:count]) if count >= 2 else ()

    def _images(self) -> tuple[str, ...]:
        typed = [name for name, kind in self.columns.items() if holds_image(kind) and name not in self.taken]
        named = [name for names in IMAGES for name in self._known(names) if self._may_hold_image(name)]
        numbered = sorted(
            (int(number[1]), column)
            for name, column in self.by_name.items()
            if (number := _NUMBERED_IMAGE.fullmatch(name)) and self._may_hold_image(column)
        )
        if len(numbered) > 1 or (numbered and not named):
            return tuple(column for _, column in numbered)
        candidates = [name for name in named if name in typed] or typed or named
        if candidates == named:  # names alone: those of the first group before the others
            candidates = self._first(IMAGES, self._may_hold_image)
        best = [name for name in candidates if folded(name) in IMAGES[0][0:2]] or candidates
        self.passed_over.extend(("images", name) for name in dict.fromkeys((*typed, *named)) if name not in best)
        found = self._agreed("images", best, lambda a, b: True, self.same_images)
        return () if found is None else (found,)

    def _may_hold_image(self, name: str) -> bool:
        return self._may_hold_media(name) and not is_video(self.columns[name]) and not names_videos(self.rows, name)

    def _videos(self) -> tuple[str, ...]:
        """The columns of videos: by type, else by name, else one for files whose cells name video files."""
        typed = [name for name, kind in self.columns.items() if is_video(kind)]
        named = self._first(VIDEOS, self._may_hold_media)
        files = [name for name in self._known(IMAGES[-1]) if names_videos(self.rows, name)]
        candidates = [name for name in named if name in typed] or typed or named or files
        found = self._agreed("videos", candidates, same_videos)
        return () if found is None else (found,)

    def _may_hold_media(self, name: str) -> bool:
        return self.columns[name].kind not in ("integer", "number", "boolean", "time", "null")

    # ── candidates ──────────────────────────────────────────────────────────────────────────────────────────

    def _known(self, names: Iterable[str]) -> list[str]:
        """The columns and dotted paths of these names that exist, in this order."""
        found: list[str] = []
        for name in names:
            first, _, rest = name.partition(".")
            column = self.by_name.get(folded(first))
            if column is not None and (not rest or self._type_at(f"{column}.{rest}") is not None):
                found.append(f"{column}.{rest}" if rest else column)
        return found

    def _first(self, groups: Sequence[Sequence[str]], fits: Callable[[str], bool]) -> list[str]:
        """The columns of the first group of names that has any."""
        return next((found for names in groups if (found := [n for n in self._known(names) if fits(n)])), [])

    def _one(self, role: str, groups: Sequence[Sequence[str]], same: Callable[[Any, Any], bool]) -> str | None:
        if (found := self._set(role)) is not None:
            return found
        return self._agreed(role, self._first(groups, lambda name: self.columns[name].kind != "null"), same)

    def _agreed(
        self,
        role: str,
        candidates: Sequence[str],
        same: Callable[[Any, Any], bool],
        same_columns: Callable[[str, str], bool] | None = None,
    ) -> str | None:
        """The first candidate. Raises ConfigError where another one says something else on the rows looked at."""
        if not candidates:
            return None
        first, *others = candidates
        for other in others:
            if same_columns is not None and not same_columns(first, other):
                raise self._ambiguous(role, first, other, "they show other pixels")
            for number, row in enumerate(self.rows):
                a, b = value_at(row, first), value_at(row, other)
                if not (is_missing(a) or is_missing(b) or same(a, b)):
                    raise self._ambiguous(role, first, other, f"row {number} has {short(a)} and {short(b)}")
            self.passed_over.append((role, other))
        return first

    def _ambiguous(self, role: str, first: str, other: str, evidence: str) -> ConfigError:
        return ConfigError(
            f"{self.prefix}.columns.{role} can be {first} or {other}, which differ ({evidence}), so it is not clear "
            f"what the rows say: set {self.prefix}.columns.{role}={first} or {self.prefix}.columns.{role}={other}"
        )

    # ── what is set ─────────────────────────────────────────────────────────────────────────────────────────

    def _set(self, role: str) -> str | None:
        value = getattr(self.wanted, role)
        if value is not None:
            self._check_exists(role, str(value))
        return None if value is None else str(value)

    def _several(self, role: str, recognized: Callable[[], tuple[str, ...]]) -> tuple[str, ...]:
        value = getattr(self.wanted, role)
        if value is None:
            return recognized()
        paths = tuple(str(path) for path in (value if isinstance(value, list | tuple) else [value]))
        for path in paths:
            self._check_exists(role, path)
        return paths

    def _check_exists(self, role: str, path: str) -> None:
        if path in self.columns or self._type_at(path) is not None:
            return
        known = list(dict.fromkeys([*self.columns, *(leaf for row in self.rows for leaf in leaves(row))]))
        if path in known or any(value_at(row, path) is not None for row in self.rows):
            return
        raise ConfigError(
            f"{self.prefix}.columns.{role}={path}: there is no such column, so it plays no part: {nearest(path, known)}"
        )

    def _type_at(self, path: str) -> ColumnType | None:
        """The type of a column or of a dotted path into structs; None where the types do not have it."""
        if path in self.columns:
            return self.columns[path]
        first, *rest = path.split(".")
        found = self.columns.get(first)
        for name in rest:
            while found is not None and found.kind == "list":
                found = found.item
            found = found.fields.get(name) if found is not None else None
        return found
