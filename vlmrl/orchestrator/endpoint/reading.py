"""Values of a JSON object, checked: each function raises `RefusedError` for a value of another form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmrl.errors import safe_repr
from vlmrl.orchestrator.endpoint.refusal import RefusedError

SHOWN = 60
"""Characters of a wrong value that a message quotes."""


def quoted(value: Any) -> str:
    """A value of the client's in a message.

    >>> quoted("a" * 100)
    "'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa…"
    """
    made = safe_repr(value)
    return made if len(made) <= SHOWN else made[:SHOWN] + "…"


def flag(given: Mapping[str, Any], key: str) -> bool:
    """A boolean, False where the key is missing."""
    value = given.get(key)
    if value is not None and not isinstance(value, bool):
        raise RefusedError(f"{key}={quoted(value)} is neither true nor false", param=key)
    return bool(value)


def whole(given: Mapping[str, Any], key: str, *, low: int, high: int = 2**31) -> int:
    """An integer in [low, high].

    >>> whole({"max_tokens": 5}, "max_tokens", low=1)
    5
    """
    value = given[key]
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RefusedError(f"{key}={quoted(value)} is no whole number from {low} to {high}", param=key)
    return value


def number(given: Mapping[str, Any], key: str, low: float, high: float) -> float:
    """A number in [low, high]."""
    value = given[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise RefusedError(f"{key}={quoted(value)} is no number from {low:g} to {high:g}", param=key)
    return float(value)


def text(value: Any, param: str) -> str:
    """A string."""
    if not isinstance(value, str):
        raise RefusedError(f"{param} is {quoted(value)}, and a string is expected", param=param)
    return value


def texts(value: Any, param: str) -> tuple[str, ...]:
    """A list of strings."""
    if not isinstance(value, list):
        raise RefusedError(f"{param} is {quoted(value)}, and a list of strings is expected", param=param)
    return tuple(text(each, f"{param}[{index}]") for index, each in enumerate(value))


def mapping(value: Any, param: str) -> dict[str, Any]:
    """An object."""
    if not isinstance(value, dict):
        raise RefusedError(f"{param} is {quoted(value)}, and an object is expected", param=param)
    return value


def items(value: Any, param: str) -> list[Any]:
    """A list."""
    if not isinstance(value, list):
        raise RefusedError(f"{param} is {quoted(value)}, and a list is expected", param=param)
    return value
