"""The values of a row: dotted paths into columns, and texts, lists and answers from whatever a cell holds.

Cells arrive as the file has them (`vlmrl.tasks.dataset.rows`). A CSV file has text only, so a list may stand there as
the text `["red", "blue"]`. A function that cannot read a value raises `ValueError`; `read` adds the column's name.
"""

from __future__ import annotations

import ast
import difflib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from vlmrl.errors import UserFault, safe_repr

T = TypeVar("T")


class Unusable(UserFault):
    """A row has something that no problem can be made of. The text says what, and what to do."""


SHOWN = 80
"""Characters of a value that a message shows."""


def short(value: object) -> str:
    """A value as a message shows it.

    >>> short("a"), len(short("a" * 1000))
    ("'a'", 81)
    """
    shown = safe_repr(value)
    return shown if len(shown) <= SHOWN else shown[:SHOWN] + "…"


# ── paths ───────────────────────────────────────────────────────────────────────────────────────────────────


def value_at(row: Mapping[str, Any], path: str) -> Any:
    """The value of a column, or of a dotted path into it; None where there is none.

    A path goes into dictionaries by name and into lists by number; a name applied to a list is applied to each item.

    >>> value_at({"reward_model": {"ground_truth": "7"}}, "reward_model.ground_truth")
    '7'
    >>> value_at({"answers": [{"answer": "yes"}, {"answer": "no"}]}, "answers.answer")
    ['yes', 'no']
    """
    if path in row:
        return row[path]
    first, *rest = path.split(".")
    return _step(row.get(first), rest)


def _step(value: Any, names: Sequence[str]) -> Any:
    if not names:
        return value
    name, *rest = names
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        value = parsed(value)
    if isinstance(value, Mapping):
        return _step(value.get(name), rest)
    if isinstance(value, list | tuple):
        if name.isdecimal():
            return _step(value[int(name)], rest) if int(name) < len(value) else None
        return [_step(item, names) for item in value]
    return None


def read(row: Mapping[str, Any], path: str, convert: Callable[[Any], T]) -> T:
    """The value at a path, converted. Raises `Unusable`, which names the column, where `convert` raises ValueError.

    >>> read({"n": [1]}, "n", as_text)
    Traceback (most recent call last):
    vlmrl.tasks.dataset.columns.Unusable: the column n holds [1], a list and not a text: name a column of texts
    """
    try:
        return convert(value_at(row, path))
    except ValueError as error:
        raise Unusable(f"the column {path} {error}") from None


def nearest(name: str, known: Iterable[str]) -> str:
    """The names that are closest to a wrong one, as the end of a sentence.

    >>> nearest("questoin", ["question", "answer"])
    'did you mean question? The columns are question, answer'
    """
    names = list(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    listed = f"the columns are {', '.join(names)}"
    return f"did you mean {' or '.join(close)}? T{listed[1:]}" if close else listed


# ── texts and lists ─────────────────────────────────────────────────────────────────────────────────────────


def is_missing(value: Any) -> bool:
    """Whether a cell says nothing: None, NaN, an empty text, a list or dictionary of nothing.

    >>> [is_missing(value) for value in (None, float("nan"), " ", [], [None], 0, False)]
    [True, True, True, True, True, False, False]
    """
    if value is None:
        return True
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, float):
        return math.isnan(value)
    if isinstance(value, list | tuple):
        return all(is_missing(item) for item in value)
    if isinstance(value, Mapping):
        return all(is_missing(item) for item in value.values())
    return False


def plain(value: Any) -> Any:
    """A value of numpy as one of Python; others as they are."""
    type_of = type(value)
    if type_of.__module__ == "numpy" and callable(getattr(type_of, "tolist", None)):
        return value.tolist()
    return value


def as_text(value: Any) -> str:
    """A cell as text. Raises `ValueError` where it holds no text and no number.

    >>> as_text("a"), as_text(3), as_text(2.50)
    ('a', '3', '2.5')
    """
    value = plain(value)
    if isinstance(value, str):
        return value
    if isinstance(value, bool | int | float):
        return number_text(value)
    raise ValueError(f"holds {short(value)}, a {type(value).__name__} and not a text: name a column of texts")


def number_text(value: float) -> str:
    """A number without a needless point.

    >>> number_text(135.0), number_text(90.9), number_text(7), number_text(True)
    ('135', '90.9', '7', 'True')
    """
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return str(value)


def as_json(value: Any) -> str:
    """A value that is no text as one: a text as it is, else JSON with plain numbers.

    >>> as_json([10.0, 20.5]), as_json("7")
    ('[10, 20.5]', '7')
    """
    value = plain(value)
    if isinstance(value, str):
        return value
    if isinstance(value, bool | int | float):
        return number_text(value)
    return json.dumps(_whole(value), ensure_ascii=False, default=str)


def _whole(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return int(value)
    if isinstance(value, Mapping):
        return {str(name): _whole(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_whole(item) for item in value]
    return plain(value)


def as_list(value: Any) -> list[Any]:
    """A cell as a list: a list as it is, a text that spells one (CSV), None as an empty one, anything else alone.

    >>> as_list(None), as_list("a"), as_list("['a', 'b']"), as_list('["a"]'), as_list(("a", "b"))
    ([], ['a'], ['a', 'b'], ['a'], ['a', 'b'])
    """
    value = plain(value)
    if value is None:
        return []
    if isinstance(value, str):
        found = parsed(value) if re.fullmatch(r"\s*\[.*\]\s*", value, re.DOTALL) else value
        return found if isinstance(found, list) else [value]
    return list(value) if isinstance(value, list | tuple) else [value]


LONGEST_LITERAL = 1 << 20
"""Characters of a text that is read as a list or a dictionary."""


def parsed(text: str) -> Any:
    """A text as JSON, or as Python spells values; the text itself where it is neither.

    >>> parsed('{"a": null}'), parsed("{'a': None}"), parsed("[a, b]")
    ({'a': None}, {'a': None}, '[a, b]')
    """
    if len(text) > LONGEST_LITERAL:
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return text


# ── answers ─────────────────────────────────────────────────────────────────────────────────────────────────

_TAGGED = re.compile(r"\s*(?:<think>.*</think>)?\s*<answer>(.*)</answer>\s*", re.DOTALL)
_BOXED = re.compile(r"\s*\$*\s*\\boxed\s*\{(.*)\}\s*\$*\.?\s*", re.DOTALL)


def unwrapped(text: str) -> str:
    r"""The answer inside a text that is nothing but a wrapped answer; other texts as they are, without white space at
    the ends.

    >>> unwrapped("<think>1 + 2</think> <answer> 3 </answer>"), unwrapped("$\\boxed{\\frac{1}{2}}$"), unwrapped(" 4 ")
    ('3', '\\frac{1}{2}', '4')
    """
    if (found := _TAGGED.fullmatch(text)) is not None:
        return unwrapped(found[1])
    found = _BOXED.fullmatch(text)
    if found is not None and "}" not in _closed_early(found[1]):
        return found[1].strip()
    return text.strip()


def _closed_early(inner: str) -> str:
    """`}` where a brace of `inner` closes that was not opened in it, as in the inside of `\boxed{1} and \boxed{2}`."""
    depth = 0
    for character in inner:
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth < 0:
            return "}"
    return ""


def as_reference(value: Any) -> Any:
    """What rewards compare an answer with: texts without their wrapping, lists without gaps, plain numbers.

    A list of dictionaries that each hold one `answer` (VQAv2) becomes the list of these. Raises `ValueError` for bytes.

    >>> as_reference("<answer> 3 </answer>"), as_reference(["7", None]), as_reference([{"answer": "cat", "id": 1}])
    ('3', ['7'], ['cat'])
    """
    value = plain(value)
    if isinstance(value, bytes | bytearray):
        raise ValueError(f"holds {len(value)} bytes and not an answer")
    if isinstance(value, str):
        return unwrapped(value)
    if isinstance(value, list | tuple):
        return [
            as_reference(item["answer"] if isinstance(item, Mapping) and "answer" in item else item)
            for item in value
            if not is_missing(item)
        ]
    return value


# ── choices ─────────────────────────────────────────────────────────────────────────────────────────────────

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

_LETTER = re.compile(r"\W*([A-Za-z])\W*")
_LETTERED = re.compile(r"\s*[(\[]?([A-Z])[)\].:]\s+(.*)", re.DOTALL)
"""An option that has its letter already: `A. red`, `(B) blue`."""


def options_of(row: Mapping[str, Any], columns: Sequence[str]) -> list[str]:
    """The options of a row, from a column with a list or from one column per option; without letters in front.

    >>> options_of({"choices": ["A. red", "B. blue"]}, ["choices"]), options_of({"A": "red", "B": None}, ["A", "B"])
    (['red', 'blue'], ['red'])
    """
    cells = [value_at(row, column) for column in columns]
    if len(cells) == 1 and isinstance(cells[0], Mapping):
        cells = [list(cells[0].get("text") or cells[0].values())]
    found = as_list(cells[0]) if len(cells) == 1 else cells
    options = [as_text(option) for option in found if not is_missing(option)]
    lettered = [_LETTERED.fullmatch(option) for option in options]
    if all(lettered) and [each[1] for each in lettered if each] == list(LETTERS[: len(options)]):
        return [each[2] for each in lettered if each]
    return options


def choice_letter(answer: Any, options: Sequence[str], first_index: int = 0) -> str:
    """The letter of the right option. Raises `ValueError` where the answer names none.

    `answer` is the option's text, its letter, or its number, of which the first option's is `first_index`.

    >>> options = ["red", "blue", "7"]
    >>> [choice_letter(answer, options) for answer in ("Blue", "(b)", 1, "1", 7, "C. 7", ["red"])]
    ['B', 'B', 'B', 'B', 'C', 'C', 'A']
    """
    answer = plain(answer)
    if isinstance(answer, list | tuple) and len(answer) == 1:
        answer = answer[0]
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    lowered = [option.strip().casefold() for option in options]
    if isinstance(answer, str) and not isinstance(answer, bool):
        text = unwrapped(answer)
        if text.casefold() in lowered:
            return LETTERS[lowered.index(text.casefold())]
        letter = _LETTER.fullmatch(text) or _LETTERED.fullmatch(text)
        if letter is not None and LETTERS.index(letter[1].upper()) < len(options):
            return letter[1].upper()
        answer = int(text) if re.fullmatch(r"\d{1,9}", text) else answer
    if isinstance(answer, int) and not isinstance(answer, bool):
        if 0 <= answer - first_index < len(options):
            return LETTERS[answer - first_index]
        if str(answer) in lowered:
            return LETTERS[lowered.index(str(answer))]
    raise ValueError(
        f"holds {short(answer)}, which is none of the {len(options)} options, so no answer would be right: correct it, "
        "or set task.columns.choices=[]"
    )


def lettered_lines(options: Sequence[str]) -> str:
    """The options as a prompt shows them.

    >>> lettered_lines(["red", "blue"])
    'A. red\\nB. blue'
    """
    return "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))


def leaves(row: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted paths of a row's values, as far as dictionaries go."""
    for name, value in row.items():
        yield prefix + str(name)
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{name}.")
