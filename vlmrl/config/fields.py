"""What a field of the schema carries besides its type: its range, and what a resumed run may do with it.

    group_size: int = setting(8, on_resume=Resume.noted, low=1, outside="a group has no rollout")

Every field that holds a value is a `setting`; fields that hold another dataclass (groups) are not.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import sys
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

T = TypeVar("T")

SMALLEST, LARGEST = math.nextafter(0.0, 1.0), sys.float_info.max
"""Lower bound of numbers that must be positive, upper bound of numbers that must be finite."""

LARGEST_SEED = 2**63 - 1
"""What torch's generators take."""


class Resume(Enum):
    """What `resume=<run> key=value` does."""

    refused = "refused"
    """The value stays: with another one, the run would no longer be one run, or its checkpoint would not fit."""
    noted = "noted"
    """The value may change, and the change is reported: the curves may bend at this step."""
    free = "free"
    """The value may change: it does not affect what is learned."""


@dataclass(frozen=True)
class Range:
    """The values that a number may have."""

    low: float
    """The lowest; allowed itself."""
    high: float
    """The highest; allowed itself."""
    consequence: str
    """What happens outside the range, e.g. `a group has no rollout`."""

    def __contains__(self, number: float) -> bool:
        return self.low <= number <= self.high  # False for NaN

    @property
    def text(self) -> str:
        """The range in words.

        >>> Range(1, math.inf, "").text, Range(SMALLEST, LARGEST, "").text, Range(0, 1, "").text
        ('1 or more', 'above 0 and finite', '0 or more and at most 1')
        """
        if (self.low, self.high) == (-LARGEST, LARGEST):
            return "finite"
        demand = "above 0" if self.low == SMALLEST else f"{self.low:g} or more"
        if self.high == LARGEST_SEED:
            return f"{demand} and below 2**63"
        if self.high == math.inf:
            return demand
        return f"{demand} and finite" if self.high == LARGEST else f"{demand} and at most {self.high:g}"


@dataclass(frozen=True)
class Setting:
    """The metadata of one field."""

    on_resume: Resume
    """What a resumed run may do with it."""
    range: Range | None = None
    """None for a field that is no number."""
    free_form: bool = False
    """A dictionary whose keys no schema knows; `key.anything=value` sets one on the command line."""
    choices: type[Enum] | None = None
    """The names of a text field that are built in; other values are import paths."""


METADATA = "vlmrl"
"""The key of the `Setting` in a dataclass field's metadata."""


def setting(
    default: T,
    *,
    on_resume: Resume,
    low: float | None = None,
    high: float = math.inf,
    outside: str = "",
    free_form: bool = False,
    choices: type[Enum] | None = None,
) -> T:
    """A dataclass field with a `Setting`. A list or dictionary as default is copied for each object.

    `low`, `high` and `outside` are the range of a number (of each number of a list) and the consequence outside it.
    """
    limits = None if low is None else Range(low, high, outside)
    metadata = {METADATA: Setting(on_resume, limits, free_form, choices)}
    field: Any
    if isinstance(default, list | dict):
        field = dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    else:
        field = dataclasses.field(default=default, metadata=metadata)
    return field  # type: ignore[no-any-return]  # dataclass turns it into the default


def setting_of(field: dataclasses.Field[Any]) -> Setting | None:
    """The metadata of a dataclass field; None where the field holds a group."""
    return field.metadata.get(METADATA)
