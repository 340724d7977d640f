"""`reward=choice`: 1 if the answer names the right option of a multiple-choice question, else 0.

    reference ─▶ numbers of the right options ◀─ compared ─▶ number of the option that the answer names
                          ▲                                      ▲
                          └──────── texts of the options ────────┘  from a column, or from the prompt

A letter names its option, in any of the ways in which people write one, and so does the option's text. What the answer
says is looked for in this order: an option by itself, the last statement ("the answer is …", "so B"), the last line, a
letter at the front, one letter in parentheses, one option's text. A text that names no option or several has value 0.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from vlmrl.config.reward import ChoiceTerm
from vlmrl.errors import safe_repr
from vlmrl.rewards.base import Attempt, RewardError
from vlmrl.types import Message, Text

OPTION_COLUMNS = ("choices", "options")
"""Columns that hold the options. task=dataset fills `choices` from whatever layout a data set has."""

SEVERAL = -1
"""The number of no option: the text names an option and contradicts itself."""

LONGEST_ANSWER = 2000
"""Characters of an answer that are read: of a longer one the end, where its conclusion stands."""

LONGEST_STATEMENT = 300
"""Characters that are read after "the answer is"."""

_LETTER = r"[(\[]?([A-Z])[)\]]?"
_MARKUP = re.compile(r"\\(?:boxed|text\w*|math\w+)\s*\{([^{}]*)\}|</?\w+>|\*+|__+|[`$\"“”#]|^'(?=.*'$)|(?<=.)'$")
_STATEMENT = re.compile(
    r"\b(?:(?:answer|ans|option|choice)\b(?:\s+(?:is|would be|should be|must be))?|choose|pick|select|it is|it's"
    r"|therefore|thus|hence|so)\b\s*[:=,]?\s*(?:(?:the\s+)?(?:option|choice|letter)\b)?\s*",
    re.IGNORECASE,
)
_CORRECT = re.compile(rf"(?<!\w){_LETTER}\s+is\s+(?:the\s+)?(?:correct|right|best|answer)\b")
_NEGATED = re.compile(r"(?:\s*,)?\s*(?:not|n't)\b[^.\n]*", re.IGNORECASE)
_ALONE = re.compile(r"[(\[]?([A-Za-z])[)\]]?[.:,]?")
_LED = re.compile(rf"{_LETTER}(?:(?<=[)\]])|[.:]|\s+[-–—])[.:]?\s*(.+)", re.DOTALL)
_LOOSELY_LED = re.compile(rf"{_LETTER}[.:,]?\s+(?:[-–—]\s*)?(.+)", re.DOTALL)
_TRAILED = re.compile(r"(.+?)\s*[(\[]([A-Z])[)\]]\.?", re.DOTALL)
_MENTIONED = re.compile(r"\(([A-Z])\)")
_STATED = re.compile(rf"{_LETTER}(?=$|[.,:;]|\s+(?:because|since|as|for|is)\b)")
_ANOTHER = re.compile(r"(?<!\w)\(?[A-Z][.)](?:\s|$)|\([A-Z]\)|^(?:or|and)\s+[A-Z]\b")
_LINE_OPTION = re.compile(r"^[ \t]*\(?([A-Z])[).:][ \t]*(\S.*?)[ \t]*$", re.MULTILINE)
_INLINE_OPTION = re.compile(r"(?<!\w)\(?([A-Z])[).]\s+(.+?)[;,]?\s*(?=(?<!\w)\(?[A-Z][).]\s|$)", re.MULTILINE)


def choice(term: ChoiceTerm) -> Callable[[Attempt], float | None]:
    """The function of a `ChoiceTerm`. It abstains where the row has no reference, and raises `RewardError` where the
    reference names no option."""

    def score(attempt: Attempt) -> float | None:
        if attempt.reference is None:
            return None
        options = options_of(attempt, term.options)
        right = {
            right_option(reference, options, term.first_index)
            for reference in (attempt.reference if isinstance(attempt.reference, list | tuple) else [attempt.reference])
        }
        return float(attempt.answer is not None and chosen_option(attempt.answer, options) in right)

    return score


# ── the options ─────────────────────────────────────────────────────────────────────────────────────────────


def options_of(attempt: Attempt, column: str | None) -> tuple[str, ...] | None:
    """The texts of the options: from `column`, from a column of `OPTION_COLUMNS`, from the columns A, B, C, …, or from
    the prompt. None where there are none. Raises `RewardError` where the row has no such column."""
    columns = attempt.columns
    if column is not None:
        if column not in columns:
            raise RewardError(
                f"reward.terms.<name>.options={column} names no column of this row, so its options are not known; it "
                f"has {', '.join(columns) or 'none'}"
            )
        return _listed(columns[column])
    for name in OPTION_COLUMNS:
        if name in columns and (listed := _listed(columns[name])):
            return listed
    letters = [columns[letter] for letter in _letters() if columns.get(letter) is not None]
    if len(letters) > 1:
        return tuple(str(text) for text in letters)
    return prompt_options(_last_text(attempt.prompt))


def _listed(value: Any) -> tuple[str, ...] | None:
    """A column's options: a list, a dictionary by letter, or either of them written as text (MMMU)."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return prompt_options(value)
    if isinstance(value, Mapping):
        value = [text for _, text in sorted(value.items())]
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        return None
    return tuple(_without_letter(str(text), number) for number, text in enumerate(value) if text is not None) or None


def _without_letter(text: str, number: int) -> str:
    """The text of an option without a letter of its own: `(B) blue` is `blue`."""
    led = _LINE_OPTION.fullmatch(text)
    return led[2] if led and ord(led[1]) - ord("A") == number else text


def prompt_options(text: str) -> tuple[str, ...] | None:
    """The options that a text lists as A, B, …: one per line, or one after the other. Of several lists the last one.

    >>> prompt_options("Is it?  (A) yes (B) no")
    ('yes', 'no')
    """
    for pattern in (_LINE_OPTION, _INLINE_OPTION):
        found: list[str] = []
        last: tuple[str, ...] | None = None
        for letter, option in pattern.findall(text):
            if letter == "A":
                found = []
            if ord(letter) - ord("A") == len(found):
                found.append(option)
                last = tuple(found) if len(found) > 1 else last
        if last is not None:
            return last
    return None


def _last_text(prompt: Sequence[Message]) -> str:
    """The text of the last message that has one."""
    for message in reversed(prompt):
        texts = [part.text for part in message.content if isinstance(part, Text)]
        if texts:
            return "\n".join(texts)
    return ""


def _letters() -> Iterator[str]:
    return (chr(code) for code in range(ord("A"), ord("Z") + 1))


# ── the reference ───────────────────────────────────────────────────────────────────────────────────────────


def right_option(reference: Any, options: tuple[str, ...] | None, first_index: int) -> int:
    """The number of the option, from 0, that a reference names: a letter, an index that counts from `first_index`, or
    the text of an option. Raises `RewardError`.

    >>> [right_option(reference, ("red", "blue"), 0) for reference in ("B", "(B) blue", "blue", 1, "1")]
    [1, 1, 1, 1, 1]
    """
    count = 26 if options is None else len(options)
    number = -1
    if isinstance(reference, str):
        text = _plain(reference)
        alone = _ALONE.fullmatch(text)
        led = _LED.fullmatch(text)
        if alone:
            number = _number(alone[1])
        elif options is not None and (equal := _equal(text, options)) is not None:
            number = equal
        elif led:
            number = _number(led[1])
        elif text.isdecimal():
            number = int(text) - first_index
    elif isinstance(reference, int | float) and float(reference).is_integer():
        number = int(reference) - first_index
    if not 0 <= number < count:
        known = "no options are known" if options is None else f"the options are {safe_repr(list(options))}"
        raise RewardError(
            f"the reference {safe_repr(reference)} names no option ({known}), so no answer can be right: name the "
            "columns of the answer and of the options with task.columns.answer and reward.terms.<name>.options"
        )
    return number


# ── the answer ──────────────────────────────────────────────────────────────────────────────────────────────


def chosen_option(answer: str, options: tuple[str, ...] | None) -> int | None:
    """The number of the option, from 0, that an answer names; None where it names none or several.

    >>> chosen_option("It could be red, but the answer is (B).", ("red", "blue"))
    1
    """
    text = _plain(answer[-LONGEST_ANSWER:])
    found = _strictly(" ".join(text.split()), options)
    if found is None:
        found, text = _stated(text, options)
    if found is None:
        found = _last_line(text, options)
    if found is None:
        found = _leading_letter(text.strip(), options)
    if found is None:
        letters = {_number(letter) for letter in _MENTIONED.findall(text)}
        if letters:
            found = letters.pop() if len(letters) == 1 else SEVERAL
    if found is None:
        found = _only_text(text, options)
    return found if found is not None and 0 <= found < _count(options) else None


def _strictly(text: str, options: tuple[str, ...] | None) -> int | None:
    """The option that a text is by itself: a letter, an option's text, or a letter with an option's text."""
    if alone := _ALONE.fullmatch(text):
        equal = _equal(text, options) if options is not None and not alone[1].isalpha() else None
        return _number(alone[1]) if equal is None else equal
    if options is None:
        led = _LED.fullmatch(text)
        return _number(led[1]) if led and not _ANOTHER.search(led[2]) else None
    if (equal := _equal(text, options)) is not None:
        return equal
    for pattern, letter, rest in ((_LOOSELY_LED, 1, 2), (_LED, 1, 2), (_TRAILED, 2, 1)):
        led = pattern.fullmatch(text)
        if led and (equal := _equal(led[rest], options)) is not None:
            return equal if equal == _number(led[letter]) else SEVERAL
    return None


def _stated(text: str, options: tuple[str, ...] | None) -> tuple[int | None, str]:
    """The option of the last statement that has one, and the text without statements that are negated."""
    found: tuple[int, int] | None = None  # where the statement stands, and its option
    for statement in _STATEMENT.finditer(text):
        rest = text[statement.end() :]
        if negated := _NEGATED.match(rest):
            text = text[: statement.end()] + " " * negated.end() + rest[negated.end() :]
            continue
        line = rest[:LONGEST_STATEMENT].lstrip().partition("\n")[0].strip()
        if (option := _option_at(line, options)) is not None:
            found = statement.start(), option
    for correct in _CORRECT.finditer(text):
        if found is None or correct.start() > found[0]:
            found = correct.start(), _number(correct[1])
    return (None if found is None else found[1]), text


def _option_at(line: str, options: tuple[str, ...] | None) -> int | None:
    """The option that the line after "the answer is" begins with."""
    sentence = re.split(r"[.!?;](?:\s|$)", line, maxsplit=1)[0]
    for part in (line, sentence):
        if (strict := _strictly(part, options)) is not None:
            return strict
    if stated := _STATED.match(line):
        if _ANOTHER.search(line[stated.end() :].lstrip(" ,")[:8]) or re.match(r",\s*[A-Z]\b", line[stated.end() :]):
            return SEVERAL
        return _number(stated[1])
    led = _leading_letter(line, options)
    return led if led is not None else _only_text(sentence, options)


def _last_line(text: str, options: tuple[str, ...] | None) -> int | None:
    """The option that the last line is by itself, unless it ends a list of the options."""
    lines = text.split("\n")
    lines = [line.strip() for line in lines if line.strip()]
    found = _strictly(lines[-1], options) if lines else None
    if found is not None and len(lines) > 1 and _strictly(lines[-2], options) == found - 1:
        return None
    return found


def _leading_letter(text: str, options: tuple[str, ...] | None) -> int | None:
    """The letter at the front, as in `B. Because it is clear`, unless another option follows."""
    led = _LED.fullmatch(text)
    if led is None:
        return None
    number, rest = _number(led[1]), led[2]
    if _ANOTHER.search(rest):
        return SEVERAL
    first = None if options is None else _first_text(rest, options)
    return number if first in (None, number) else SEVERAL


def _first_text(text: str, options: tuple[str, ...]) -> int | None:
    """The option whose text another text begins with; of two the longer one."""
    folded = _folded(text)
    starting = [number for number, option in enumerate(options) if re.match(_bounded(_folded(option)), folded)]
    return max(starting, key=lambda number: len(options[number]), default=None)


def _only_text(text: str, options: tuple[str, ...] | None) -> int | None:
    """The one option whose text stands in another text. A longer option hides a shorter one in it."""
    folded, found = _folded(text), list[int]()
    for number, option in sorted(enumerate(options or ()), key=lambda pair: -len(_folded(pair[1]))):
        pattern = _bounded(_folded(option))
        if _folded(option) and re.search(pattern, folded):
            found.append(number)
            folded = re.sub(pattern, "\n", folded)
    return found[0] if len(found) == 1 else None


def _equal(text: str, options: tuple[str, ...]) -> int | None:
    """The first option whose text equals another, apart from case, articles and punctuation at the ends."""
    folded = _folded(text)
    return next((number for number, option in enumerate(options) if folded and _folded(option) == folded), None)


def _bounded(folded: str) -> str:
    """A pattern that finds a text where it is not a part of a longer word, number or formula."""
    return rf"(?<![\w^])(?<!\d[.,]){re.escape(folded)}(?![\w^])(?![.,]\d)"


def _folded(text: str) -> str:
    """A text for a comparison: no case, no markup, no article in front, no punctuation at the ends.

    >>> _folded("**The blue.** "), _folded("$12$ cm")
    ('blue', '12 cm')
    """
    text = " ".join(_plain(text).casefold().split()).strip(" .,:;!?()[]'")
    return re.sub(r"^(?:an?|the)\s+(?=\S)", "", text)


def _plain(text: str) -> str:
    r"""A text without the markup of LaTeX, HTML and Markdown around its words.

    >>> _plain(r"**Answer:** $\boxed{\text{B}}$")
    'Answer: B'
    """
    before = None
    while before != text:
        before, text = text, _MARKUP.sub(lambda found: found[1] or "", text)
        text = text.strip()
    return text


def _number(letter: str) -> int:
    return ord(letter.upper()) - ord("A")


def _count(options: tuple[str, ...] | None) -> int:
    return 26 if options is None else len(options)
