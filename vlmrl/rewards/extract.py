r"""Find the answer in a completion (`reward.extract`), for the terms that compare it with the reference.

>>> from vlmrl.config.reward import ExtractConfig, Extraction
>>> boxed = extractor(ExtractConfig(Extraction.boxed), key="reward.extract")
>>> boxed(r"So \boxed{1}. No: \boxed{\frac{1}{2}}.")
'\\frac{1}{2}'
>>> boxed("It is one half.") is None
True
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeAlias

import regex

from vlmrl.config.reward import ExtractConfig, Extraction
from vlmrl.errors import ConfigError, safe_repr
from vlmrl.rewards.base import RewardError

Extractor: TypeAlias = Callable[[str], str | None]
"""Completion → answer without white space at its ends; None where the completion has none."""

SEARCH_TIMEOUT_S = 1.0
"""Processor seconds that a search may take. `(a+)+b` on a row of 30 letters would take minutes, and nothing can stop
Python's own `re`, which also keeps every other thread waiting."""


def extractor(
    own: ExtractConfig, shared: ExtractConfig | None = None, *, key: str, shared_key: str = "reward.extract"
) -> Extractor:
    """The function that `own` chooses, or `shared` where `own` leaves it open. The keys name them in an error.

    Raises `ConfigError` where a pattern is missing or not a regular expression.
    """
    config = own if own.kind is not None or shared is None else shared
    match config.kind:
        case Extraction.boxed:
            return last_boxed
        case Extraction.tag:
            return lambda completion: last_tagged(completion, config.tag)
        case Extraction.last_line:
            return last_line
        case Extraction.regex:
            return _by_pattern(config, key if config is own else shared_key)
    return str.strip


def last_boxed(completion: str) -> str | None:
    r"""What stands in the last `\boxed{…}` (or `\fbox{…}`) whose braces close. `\{` and `\}` count as text.

    >>> last_boxed(r"\boxed{\{1, 2\}}, cut off: \boxed{3")
    '\\{1, 2\\}'
    """
    found, open_braces = None, list[tuple[bool, int]]()  # of each: whether it is a box's, and where its content begins
    last_start = -1
    for piece in _BOXES_AND_BRACES.finditer(completion):
        if piece[0] == "}" and open_braces:
            is_box, start = open_braces.pop()
            if is_box and start > last_start:  # of nested boxes the inner one, which closes first, begins last
                found, last_start = completion[start : piece.start()].strip(), start
        elif piece[0].endswith("{") and piece[0] != "\\{":
            open_braces.append((piece[0] != "{", piece.end()))
    return found


_BOXES_AND_BRACES = re.compile(r"\\+f?box(?:ed)?\s*\{|\\.|[{}]", re.DOTALL)


def last_tagged(completion: str, tag: str) -> str | None:
    """What stands between the last `<tag>` that is closed and its `</tag>`.

    >>> last_tagged("<answer>4</answer> or rather <answer> 5 </answer>", "answer")
    '5'
    """
    opening, closing = f"<{tag}>", f"</{tag}>"
    found, start = None, completion.find(opening)
    while start >= 0 and (end := completion.find(closing, start)) >= 0:
        found = completion[completion.rfind(opening, start, end) + len(opening) : end].strip()
        start = completion.find(opening, end)
    return found


def last_line(completion: str) -> str | None:
    r"""The last line that is not empty.

    >>> last_line("I count them.\nThere are 5.\n\n")
    'There are 5.'
    """
    lines = completion.strip().splitlines()
    return lines[-1].strip() if lines else None


def compiled(pattern: str, key: str) -> regex.Pattern[str]:
    """A regular expression in which `.` also matches the end of a line. Raises `ConfigError`; `key` names it there."""
    try:
        return regex.compile(pattern, regex.DOTALL)
    except regex.error as error:
        raise ConfigError(
            f"{key}={pattern} is not a regular expression ({error}), so it matches no answer: correct it, and quote it "
            "on the command line"
        ) from error


def timed_out(key: str, text: str) -> RewardError:
    """The fault of a rollout on whose completion a search took too long."""
    return RewardError(
        f"{key} took longer than {SEARCH_TIMEOUT_S:g} s on a completion of {len(text)} characters that begins with "
        f"{safe_repr(text[:60])}: write it without a repetition inside a repetition, such as (a+)+"
    )


def _by_pattern(config: ExtractConfig, key: str) -> Extractor:
    if config.pattern is None:
        raise ConfigError(
            f"{key}.kind=regex has no pattern, so no answer is found: set {key}.pattern to a regular expression with a "
            "group around the answer"
        )
    pattern = compiled(config.pattern, f"{key}.pattern")

    def last_match(completion: str) -> str | None:
        found = None
        try:
            for found in pattern.finditer(completion, timeout=SEARCH_TIMEOUT_S):  # noqa: B007
                pass
        except TimeoutError:
            raise timed_out(f"{key}.pattern", completion) from None
        if found is None:
            return None
        groups = (group for group in found.groups() if group is not None)
        answer: str = next(groups, found[0])
        return answer.strip()

    return last_match
