"""Numbers lie in the ranges, and texts have the forms, that their fields declare."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from vlmrl.config.ranges import numbers_with_ranges, texts_with_forms
from vlmrl.config.run import RunConfig
from vlmrl.errors import ConfigError, safe_text


def numbers_in_range(config: RunConfig) -> None:
    """Every number lies in its range; NaN lies in none."""
    for key, number, allowed in numbers_with_ranges(config):
        if number not in allowed:
            raise ConfigError(
                f"{key}={number} is out of range, and with such a value {allowed.consequence}: set {key} to a value "
                f"that is {allowed.text}."
            )


def texts_have_their_form(config: RunConfig) -> None:
    """Every text that names something can be such a name, and every text and key can be written to a file."""
    for key, text in _all_texts(dataclasses.asdict(config), ""):
        if text != safe_text(text):
            raise ConfigError(
                f"{safe_text(key)}={safe_text(text)} holds bytes that are not UTF-8, so config.yaml could not be "
                "written: correct the spelling, or rename the file"
            )
    for key, text, form in texts_with_forms(config):
        if text not in form:
            raise ConfigError(
                f"{key}={text!r} cannot be used, and with such a value {form.consequence}: set {key} to {form.demand}."
            )


def _all_texts(tree: Any, key: str) -> Iterator[tuple[str, str]]:
    match tree:
        case Mapping():
            for name, value in tree.items():
                yield from _all_texts(name, key)
                yield from _all_texts(value, f"{key}.{name}".lstrip("."))
        case list() | tuple():
            for value in tree:
                yield from _all_texts(value, key)
        case str():
            yield key, tree
