"""Numbers in English words, rewritten as digits.

    "one hundred and five" ─▶ "105"      "two thirds" ─▶ "2/3"      "three and a half" ─▶ "3.5"

Left out on purpose: other languages, and ordinals (`first`) outside a fraction.
"""

from __future__ import annotations

import re

SMALL = {
    word: value
    for value, word in enumerate(
        [
            "zero",
            "one",
            "two",
            "three",
            "four",
            "five",
            "six",
            "seven",
            "eight",
            "nine",
            "ten",
            "eleven",
            "twelve",
            "thirteen",
            "fourteen",
            "fifteen",
            "sixteen",
            "seventeen",
            "eighteen",
            "nineteen",
        ]
    )
}
TENS = {
    word: 10 * (value + 2)
    for value, word in enumerate(["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"])
}
SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
PARTS = {
    word: value + 3
    for value, word in enumerate(["third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth"])
} | {"half": 2, "halve": 2, "quarter": 4}

_ANY = "|".join(sorted((*SMALL, *TENS, *SCALES, *PARTS, "hundred", "dozen", "point"), key=len, reverse=True))
_JOIN = r"(?:\s+and\s+(?:an?\s+)?|[\s-]+(?:an?\s+)?|\s*,\s*)"
_SPAN = re.compile(rf"\b(?:an?\s+)?(?:{_ANY})s?\b(?:{_JOIN}(?:{_ANY})s?\b)*", re.IGNORECASE)
_TOKEN = re.compile(r"[a-z]+|,", re.IGNORECASE)


def words_to_digits(text: str) -> str:
    """`text` with each number in words replaced by digits.

    >>> words_to_digits("twenty-one dogs and one million two hundred thousand cats")
    '21 dogs and 1200000 cats'
    >>> words_to_digits("seven or eight; three quarters; the third; two point five")
    '7 or 8; 3/4; the third; 2.5'
    """
    return _SPAN.sub(lambda span: _Reader(span[0]).digits(), text)


class _Reader:
    """Reads the words of one span from left to right. Words that do not continue a number begin the next one."""

    def __init__(self, span: str) -> None:
        self._span = span
        self._done: list[str] = []
        self._clear()

    def digits(self) -> str:
        """The span in digits; the span itself where it holds no number, such as `third` and `point`."""
        for word in _TOKEN.findall(self._span.lower()):
            self._read(word)
        self._finish()
        return " ".join(self._done) if self._done else self._span

    def _clear(self) -> None:
        self._total = self._current = 0
        self._any = False  # whether a number has begun
        self._last_scale = 10**15
        self._decimals: str | None = None
        self._article = False  # whether the last word is `a`
        self._joined = False  # whether the last word is `and`

    def _finish(self) -> None:
        if self._any:
            self._done.append(f"{self._total + self._current}" + (f".{self._decimals}" if self._decimals else ""))
        self._clear()

    def _read(self, word: str) -> None:
        if word in ("a", "an"):
            self._article = True
            return
        if word in ("and", ","):
            self._joined = True
            return
        singular = word if word in SMALL else word.removesuffix("s")
        if singular in SMALL or singular in TENS:
            self._small(SMALL.get(singular, TENS.get(singular, 0)))
        elif singular == "hundred":
            self._start_at_one()
            self._current *= 100
        elif singular == "dozen":
            self._start_at_one()
            self._current *= 12
        elif singular in SCALES:
            self._scale(SCALES[singular])
        elif singular == "point":
            self._decimals = "" if self._any else None
        else:
            self._part(PARTS[singular], named=singular == "half")
        self._article = self._joined = False

    def _small(self, value: int) -> None:
        if self._decimals is not None:
            self._decimals += str(value)
            return
        last_two = self._current % 100
        continues = (last_two == 0 and self._current + self._total > 0) or (
            last_two >= 20 and last_two % 10 == 0 and 0 < value < 10 and not self._joined
        )
        if self._any and not continues:
            self._finish()
        self._any = True
        self._current += value

    def _start_at_one(self) -> None:
        """`a hundred` and a bare `hundred` are one hundred."""
        if self._current == 0:
            self._current = 1
        self._any = True

    def _scale(self, scale: int) -> None:
        self._start_at_one()
        if scale >= self._last_scale:  # `two thousand three million` are two numbers
            self._finish()
            self._start_at_one()
        self._total += self._current * scale
        self._current, self._last_scale = 0, scale

    def _part(self, parts: int, *, named: bool) -> None:
        whole = self._total + self._current
        if self._any and (self._joined or self._article):  # `three and a half`
            self._done.append(f"{whole + 1 / parts}")
        elif self._any:  # `two thirds`
            self._done.append(f"{whole}/{parts}")
        elif self._article or named:  # `a third`, `half`; `the third` is no number
            self._done.append(f"1/{parts}")
        self._clear()
