"""Units of measurement: one name for all spellings of a unit.

Left out on purpose: conversion. `12 cm` and `0.12 m` are different answers.
"""

from __future__ import annotations

import re

CURRENCIES = "$€£¥₹₩₽₺₫฿"

_POWER = r"(?:\s?\^\s?\{?-?[23]\}?|-?[23](?![\d.]))?"
_WORD = rf"(?:[A-Za-zµμΩ]+|°[CFK]?|['\"′″]|[{re.escape(CURRENCIES)}])"
UNIT = rf"(?:(?:square|cubic|sq\.?|cu\.?)\s+)?{_WORD}{_POWER}(?:\s?(?:/|\bper\b)\s?{_WORD}{_POWER})?"
"""A regular expression for the unit after a number."""

_SPELLINGS = {
    "mm": "millimeter millimetre", "cm": "centimeter centimetre", "m": "meter metre", "km": "kilometer kilometre",
    "in": "inch inche \" ″", "ft": "foot feet ' ′", "yd": "yard", "mi": "mile", "mg": "milligram", "g": "gram gramme",
    "kg": "kilogram kilo kgs", "lb": "lbs pound", "oz": "ounce", "t": "ton tonne", "ms": "millisecond msec",
    "s": "sec second secs", "min": "minute mins", "h": "hour hr hrs", "d": "day", "yr": "year",
    "ml": "milliliter millilitre", "l": "liter litre", "°": "degree deg", "°C": "celsius", "°F": "fahrenheit",
    "$": "dollar usd", "€": "euro eur", "£": "gbp", "¥": "yen jpy", "₹": "rupee inr rs",
}  # fmt: skip
_NAMES = {spelling: name for name, spellings in _SPELLINGS.items() for spelling in spellings.split()}
_DIMENSIONS = {"square": "2", "sq": "2", "cubic": "3", "cu": "3"}


def unit_name(text: str) -> str:
    """The name that all spellings of a unit share; a noun that is no unit of measurement loses its plural.

    >>> [unit_name(text) for text in ("centimetres", "cm^{2}", "square meters", "m / s", "meters per second", "Apples")]
    ['cm', 'cm2', 'm2', 'm/s', 'm/s', 'apple']
    """
    above, _, below = re.sub(r"\bper\b", "/", text).partition("/")
    return "/".join(_single_name(part) for part in (above, below) if part.strip())


def _single_name(text: str) -> str:
    words = re.sub(r"[\^{}.]", "", text).split()
    power = _DIMENSIONS.get(words[0].lower(), "") if len(words) > 1 else ""
    if power:
        words = words[1:]
    joined = "".join(words)
    word = joined.rstrip("-23")
    return _word_name(word) + (power or joined[len(word) :])


def _word_name(word: str) -> str:
    if word in _SPELLINGS:
        return word
    lower = word.lower()
    for spelling in (lower, lower.removesuffix("s")):
        if spelling in _SPELLINGS:
            return spelling
        if spelling in _NAMES:
            return _NAMES[spelling]
    return lower.removesuffix("s") if len(lower) > 3 else lower
