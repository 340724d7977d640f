"""The ranges of numbers in the config, from the metadata of their fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from vlmrl.config.fields import Range, setting_of
from vlmrl.config.keys import settings_at


def numbers_with_ranges(config: Any, prefix: str = "") -> Iterator[tuple[str, float, Range]]:
    """The dotted key, value and range of every number in a config; each number of a list comes separately.

    Numbers that are None, and groups that the config does not have, are skipped.
    """
    for field in dataclasses.fields(config):
        key, value, setting = prefix + field.name, getattr(config, field.name), setting_of(field)
        if setting is not None and setting.range is not None and value is not None:
            for number in value if isinstance(value, tuple | list) else (value,):
                yield key, number, setting.range
        elif dataclasses.is_dataclass(value):
            yield from numbers_with_ranges(value, f"{key}.")
        elif isinstance(value, Mapping):
            for name, item in value.items():
                if dataclasses.is_dataclass(item):
                    yield from numbers_with_ranges(item, f"{key}.{name}.")


def range_text(key: str) -> str:
    """The values that a key may have, in words; "" for a key that is not a number.

    >>> range_text("trainer.max_steps"), range_text("trainer.learning_rate"), range_text("trainer.decay")
    ('1 or more', 'above 0 and finite', '')
    """
    return next((setting.range.text for setting in settings_at(key) if setting.range is not None), "")
