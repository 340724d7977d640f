"""Numbers lie in the ranges that their fields declare."""

from __future__ import annotations

from vlmrl.config.ranges import numbers_with_ranges
from vlmrl.config.run import RunConfig
from vlmrl.errors import ConfigError


def numbers_in_range(config: RunConfig) -> None:
    """Every number lies in its range; NaN lies in none."""
    for key, number, allowed in numbers_with_ranges(config):
        if number not in allowed:
            raise ConfigError(
                f"{key}={number} is out of range, and with such a value {allowed.consequence}: set {key} to a value "
                f"that is {allowed.text}."
            )
