"""The ranges of numbers and the forms of texts in the config, from the metadata of their fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from vlmrl.config.fields import Form, Range, Setting, setting_of
from vlmrl.config.keys import settings_at


def numbers_with_ranges(config: Any) -> Iterator[tuple[str, float, Range]]:
    """The dotted key, value and range of every number in a config; each number of a list comes separately.

    Numbers that are None, and groups that the config does not have, are skipped.
    """
    for key, value, setting in values_with_settings(config):
        if setting.range is not None:
            for number in value if isinstance(value, tuple | list) else (value,):
                yield key, number, setting.range


def texts_with_forms(config: Any) -> Iterator[tuple[str, str, Form]]:
    """The dotted key, value and form of every text in a config; each text of a list comes separately."""
    for key, value, setting in values_with_settings(config):
        for text in value if isinstance(value, tuple | list) else (value,):
            if isinstance(text, str):
                yield key, text, setting.form


def values_with_settings(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Setting]]:
    """The dotted key, value and metadata of every value that is not None; groups that are None are skipped."""
    for field in dataclasses.fields(config):
        key, value, setting = prefix + field.name, getattr(config, field.name), setting_of(field)
        if setting is not None and value is not None:
            yield key, value, setting
        elif dataclasses.is_dataclass(value):
            yield from values_with_settings(value, f"{key}.")
        elif isinstance(value, Mapping):
            for name, item in value.items():
                if dataclasses.is_dataclass(item):
                    yield from values_with_settings(item, f"{key}.{name}.")


def range_text(key: str) -> str:
    """The values that a key may have, in words; "" for a key that is not a number.

    >>> range_text("trainer.max_steps"), range_text("trainer.learning_rate"), range_text("trainer.decay")
    ('1 or more and at most 1000000000', 'above 0 and at most 100', '')
    """
    return next((setting.range.text for setting in settings_at(key) if setting.range is not None), "")
