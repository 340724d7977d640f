r"""`reward=number`: whether the last number of the answer is the reference.

    answer ─▶ plain spelling ─▶ numbers with percent signs and units ─▶ compare the last with the reference

Numbers are read as people and models write them: `1,200.50`, `1 200,5`, `1.2e3`, `1.2 \times 10^3`, `-3/4`, `1½`,
`\frac{1}{2}`, `45%`, `$1.2M`, `12 cm²`, `seven`. Where a spelling has two readings:

- One comma is a thousands separator where exactly three digits follow (`1,200`), else a decimal comma (`0,5`). `1,2,3`
  and `(3,4)` are lists; `5,6` is also read as a list where several numbers are wanted. One point is always a decimal
  point, so `1.200` is 1.2, while `1.200,5` is 1200.5.
- A minus between two numbers is a range (`3-4` is 3 and 4). A minus in front of a number is a sign.
- Digits that follow a letter or a power (`H2O`, `x^2`, `5 m2`) are no numbers, nor are factors of roots and of π.
- Words count only where the text has no number in digits: `5 dogs, and one is black` is 5.
- A reference with several numbers (`3:4`, `10:30`, `(3, -4)`) wants all of them, in order, as the last of the answer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from vlmrl.config.reward import NumberTerm, PercentSign, UnitRule
from vlmrl.rewards.base import Attempt
from vlmrl.rewards.number_units import CURRENCIES, UNIT, unit_name
from vlmrl.rewards.number_words import words_to_digits

LONGEST_ANSWER = 10_000
"""Characters of an answer that are read, from its end: the last number counts."""


@dataclass(frozen=True)
class Quantity:
    """One number of a text."""

    value: float
    """As written: 45 for `45%`."""
    is_percent: bool = False
    unit: str = ""
    """The name that all spellings of the unit share, such as `cm2`; empty without a unit."""


def score_number(term: NumberTerm, attempt: Attempt) -> float | None:
    """1.0 if the last number of the answer is the reference within the tolerance, else 0.0. None, so the term abstains,
    where the reference holds no number. Of a reference that is a list, any entry will do."""
    references = attempt.reference if isinstance(attempt.reference, list | tuple) else [attempt.reference]
    wanted = [numbers for reference in references for numbers in _readings(_as_text(reference)) if numbers]
    if not wanted:
        return None
    as_number, *as_list = _readings((attempt.answer or "")[-LONGEST_ANSWER:])
    return float(
        any(
            _all_equal(term, found[-len(numbers) :], numbers)
            for numbers in wanted
            for found in (as_number, *(as_list if len(numbers) > 1 else []))
        )
    )


def _readings(text: str) -> list[list[Quantity]]:
    """The numbers of a text, and those of the text with `5,6` as a list. The second reading counts only where several
    numbers are wanted."""
    spaced = _TIGHT_LIST.sub(", ", text)
    return [quantities(text)] if spaced == text else [quantities(text), quantities(spaced)]


_TIGHT_LIST = re.compile(r"(?<=\d),(?=-?\d)")


def quantities(text: str) -> list[Quantity]:
    """The numbers of a text, in order.

    >>> quantities("It costs $1,200.50, or 45% of it.")
    [Quantity(value=1200.5, is_percent=False, unit='$'), Quantity(value=45.0, is_percent=True, unit='')]
    """
    plain = _plain(text)
    return list(_read(plain)) or list(_read(words_to_digits(plain)))


def _as_text(reference: Any) -> str:
    return "" if reference is None or isinstance(reference, bool) else str(reference)


# ── comparing ───────────────────────────────────────────────────────────────────────────────────────────────


def _all_equal(term: NumberTerm, found: list[Quantity], wanted: list[Quantity]) -> bool:
    return len(found) == len(wanted) and all(_equal(term, *pair) for pair in zip(found, wanted, strict=True))


def _equal(term: NumberTerm, found: Quantity, wanted: Quantity) -> bool:
    if term.units is UnitRule.match and wanted.unit and found.unit != wanted.unit:
        return False
    as_written, as_share = (found.value, wanted.value), (_share(found), _share(wanted))
    readings = {
        PercentSign.plain: [as_written],
        PercentSign.share: [as_share],
        PercentSign.either: [as_written] if found.is_percent == wanted.is_percent else [as_written, as_share],
    }[term.percent]
    return any(abs(a - b) <= _tolerance(term, b) for a, b in readings)


def _tolerance(term: NumberTerm, wanted: float) -> float:
    """The largest allowed difference. The last summand covers the rounding of the difference itself, so that 0.3 is
    within 0.1 of 0.2."""
    return max(term.absolute, term.relative * abs(wanted)) + 4 * math.ulp(wanted)


def _share(quantity: Quantity) -> float:
    return quantity.value / 100 if quantity.is_percent else quantity.value


# ── from LaTeX and Unicode to plain spelling ────────────────────────────────────────────────────────────────

_VULGAR = {
    "½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅖": "2/5", "⅗": "3/5", "⅘": "4/5",
    "⅙": "1/6", "⅚": "5/6", "⅛": "1/8", "⅜": "3/8", "⅝": "5/8", "⅞": "7/8",
}  # fmt: skip
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_CHARACTERS = str.maketrans(
    {chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}  # full-width forms
    | dict.fromkeys("−–—﹣‐‑‒", "-")
    | dict.fromkeys("\u202f\u2009\u2007", "\xa0")
    | dict.fromkeys("·⋅∙∗", "×")
    | {"’": "'", "⁄": "/", "\u3000": " "}
    | _VULGAR
)
_FRACTION = r"\\[dtc]?frac\s*(?:\{\s*(-?\d+(?:\.\d+)?)\s*\}|(\d))\s*(?:\{\s*(\d+(?:\.\d+)?)\s*\}|(\d))"
_REWRITES: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    (re.compile(rf"(?<=\d)(?=[{''.join(_VULGAR)}])"), " "),
    (re.compile(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+"), lambda found: f"^{found[0].translate(_SUPERSCRIPTS)}"),
    (re.compile(r".+", re.DOTALL), lambda found: found[0].translate(_CHARACTERS)),
    (re.compile(r"\\(?:left|right|displaystyle)(?![a-z])"), ""),
    (re.compile(r"\{,\}|,\\!"), ","),
    (re.compile(r"\\[,;:! ]"), "\xa0"),
    (re.compile(r"\\(?:text|mathrm|mathbf|textbf|mathit|mbox|operatorname|boxed|fbox)\s*\{([^{}]*)\}"), r" \1"),
    (re.compile(r"\\([%$])"), r"\1"),
    (re.compile(r"\\(?:times|cdot)(?![a-z])|(?<=\d)\s*[xX]\s*(?=\d)"), "×"),
    (re.compile(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree"), "°"),
    (re.compile(rf"(?<=\d)\s*{_FRACTION}"), lambda found: f" {_fraction(found)} "),
    (re.compile(_FRACTION), lambda found: f"{_fraction(found)} "),
    (re.compile(r"(?<=\d)\*\*(?=[-+]?\d)"), "^"),
    (re.compile(r"(?<=\d)\s?\*\s?(?=\d)"), "×"),
    (re.compile(r"\$([^$\n]*)\$(?!\d)"), r" \1 "),  # of mathematics, not of dollars
    (re.compile(r"(?<=[(\[{])\s*(-?\d[\d.]*),(?!\d{3}\b)(-?\d[\d.]*)\s*(?=[)\]}])"), r"\1, \2"),  # a pair
]


def _fraction(found: re.Match[str]) -> str:
    return f"{found[1] or found[2]}/{found[3] or found[4]}"


def _plain(text: str) -> str:
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return text


# ── reading numbers ─────────────────────────────────────────────────────────────────────────────────────────

_MAGNITUDES = {
    "hundred": 1e2, "thousand": 1e3, "million": 1e6, "mn": 1e6, "billion": 1e9, "bn": 1e9, "trillion": 1e12,
    "k": 1e3, "m": 1e6, "b": 1e9,
}  # fmt: skip

_DIGITS = r"""
    (?P<commas> [1-9]\d{0,2} (?:,\d{3})++ (?:\.\d+)? (?!,?\d)                          # 1,200.50
              | [1-9]\d? (?:,\d\d){1,5} ,\d{3} (?:\.\d+)? (?!,?\d) )                      # 1,23,456
  | (?P<points> [1-9]\d{0,2} (?: (?:\.\d{3}){2,}+ (?:,\d+)? | (?:\.\d{3})++ ,\d+ ) (?![.,]?\d) )   # 1.200,5
  | (?P<spaces> (?<!\d[ ]) [1-9]\d{0,2} (?P<space>[ \xa0'_]) \d{3} (?:(?P=space)\d{3})*+ (?:[.,]\d+)? (?![ ]?\d) )
  | (?P<comma>  (?<!\d,) \d++ ,\d++ (?![,.]\d) )                                       # 0,5
  | (?P<point>  (?<!\d\.) (?: \d++ (?:\.\d++)? | (?<!\w) \.\d++ ) (?!\.\d) )           # 12, 12.5, .5
"""

_NUMBER = re.compile(
    rf"""
    (?<! [A-Za-z_\d^{{√] ) (?<! \^- )
    (?P<sign> (?<![\w.)\]%°}}]) [-+] | ^\s* [-+]\s+ | \b(?:minus|negative)\s+ )?
    (?P<currency> [{re.escape(CURRENCIES)}] )? (?P<late_sign> - )?
    (?<! [A-Za-z_\d^{{√] ) (?: {_DIGITS} )
    (?P<exponent> [eE][-+]?\d+ (?!\w) )?
    (?P<times_ten> \s?×\s?10\s?\^\s?\{{?(?P<ten_power>[-+]?\d+)\}}? )?
    (?P<power> \^\{{?(?P<to>[-+]?\d+)\}}? (?P<chain> \^ )? )?
    (?P<mixed> [ ](?P<upper>\d+)\s?/\s?(?P<lower>\d+) (?![\d/]) )?
    (?P<over> (?<!/\d) (?<!/\d\d) \s?/\s?(?P<divisor>\d+(?:\.\d+)?+) (?![\d/]) )?
    (?! \s*(?: √ | π | \\pi | \\sqrt | \\frac | \\d?frac | pi\b | sqrt\b | \^ ) )
    (?: \s*(?P<magnitude> (?i:hundred|thousand|million|billion|trillion|mn|bn)\b | (?-i:k)\b ) )?
    (?: \s*(?P<percent> % | (?i:per\s?cent(?:age\spoints?)?|pct)\b ) )?
    (?P<half> \s+and\s+a\s+half\b )?
    (?: \s*(?P<unit> {UNIT} ) )?
    """,
    re.VERBOSE,
)
_LETTER_MAGNITUDE = re.compile(r"[KkMmBb]n?")


def _read(text: str) -> Iterator[Quantity]:
    for found in _NUMBER.finditer(re.sub(r"(?<=[\d.%°])\s?±\s?[\d.]+", "", text)):
        value = _value(found)
        unit = "" if found["percent"] else found["currency"] or found["unit"] or ""
        if value is not None and math.isfinite(value):
            yield Quantity(value, found["percent"] is not None, unit_name(unit))


def _value(found: re.Match[str]) -> float | None:
    """The number of a match; None where it has none: `1/0`, `9^9^9`, more than a float holds."""
    if found["chain"]:
        return None
    try:
        value = float(_digits(found) + (found["exponent"] or ""))
        if found["times_ten"]:
            value *= 10.0 ** int(found["ten_power"])
        if found["power"]:
            value **= int(found["to"])
        if found["mixed"]:
            value += int(found["upper"]) / int(found["lower"])
        if found["over"]:
            value /= float(found["divisor"])
    except (OverflowError, ZeroDivisionError, ValueError):  # ValueError: more digits than `int` takes
        return None
    value = value * _magnitude(found) + (0.5 if found["half"] else 0.0)
    is_negative = (found["sign"] or "+").strip() not in ("+", "") or found["late_sign"]
    return -value if is_negative else value


def _digits(found: re.Match[str]) -> str:
    """The digits with a decimal point and without separators."""
    if found["points"]:
        return found["points"].replace(".", "").replace(",", ".")
    if found["spaces"]:
        return found["spaces"].replace(found["space"], "").replace(",", ".")
    return (found["commas"] or "").replace(",", "") or (found["comma"] or "").replace(",", ".") or found["point"]


def _magnitude(found: re.Match[str]) -> float:
    """`million` always counts, `k` next to its number, `M` and `B` only with a currency: `3 m` is a length."""
    word = found["magnitude"]
    if word is None and found["currency"] and found["unit"] and _LETTER_MAGNITUDE.fullmatch(found["unit"]):
        word = found["unit"][0]
    return _MAGNITUDES[word.lower()] if word else 1.0
