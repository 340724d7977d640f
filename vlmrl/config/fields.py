"""What a field of the schema carries besides its type: its range, and what a resumed run may do with it.

    group_size: int = setting(8, on_resume=Resume.noted, low=1, outside="a group has no rollout")

Every field that holds a value is a `setting`; fields that hold another dataclass (groups) are not.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

T = TypeVar("T")

SMALLEST = math.nextafter(0.0, 1.0)
"""Lower bound of numbers that must be positive."""

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
        """The range in words. A bound that lies next to a whole number excludes that number.

        >>> Range(1, 100, "").text, Range(SMALLEST, math.inf, "").text, Range(0, 1 - 2**-53, "").text
        ('1 or more and at most 100', 'above 0', '0 or more and below 1')
        """
        below, above = math.nextafter(self.low, -math.inf), math.nextafter(self.high, math.inf)
        is_open = not float(self.low).is_integer() and below.is_integer()
        demand = f"above {_spelled(below)}" if is_open else f"{_spelled(self.low)} or more"
        if self.high == math.inf:
            return demand
        if self.high == LARGEST_SEED:
            return f"{demand} and below 2**63"
        if not float(self.high).is_integer() and above.is_integer():
            return f"{demand} and below {_spelled(above)}"
        return f"{demand} and at most {_spelled(self.high)}"


def _spelled(number: float) -> str:
    """A number as a config has it: whole numbers without a point.

    >>> _spelled(2**31), _spelled(-1e9), _spelled(1e-30), _spelled(0.5)
    ('2147483648', '-1000000000', '1e-30', '0.5')
    """
    return str(int(number)) if float(number).is_integer() else repr(float(number))


@dataclass(frozen=True)
class Form:
    """The texts that a text field may have."""

    pattern: str
    """A regular expression for all of the text."""
    demand: str
    """The pattern in words, e.g. `of the form http://host:port`."""
    consequence: str
    """What happens with another text, e.g. `no server is found`."""
    raw: bool = False
    """A template, a pattern or a prompt: `${…}` in it is part of the text, wherever it is written, and no reference."""

    def __contains__(self, text: str) -> bool:
        return re.fullmatch(self.pattern, text, re.DOTALL) is not None


ONE_LINE = Form(r"(?=.*\S)[^\x00-\x1f\x7f]*", "one line that is not empty", "there is nothing of that name")
"""The form of a text field that states no other."""

NAME = Form(r"[\w.-]+", "a name of letters, digits, dots, dashes and underscores", "there is nothing of that name")

PROSE = Form(r"(?=.*\S)[^\x00\x7f]*", "text that is not empty", "the policy would read nothing", raw=True)
"""The form of a text of several lines, such as a prompt."""

PATTERN = Form(r"(?=.*\S)[^\x00\x7f]*", "a regular expression that is not empty", "it would match every text", raw=True)

METRIC = Form(r"eval/[^\x00-\x1f\x7f]+", "a metric of an evaluation, eval/…", "no evaluation has a value to compare")

ANY_TEXT = Form(r".*", "any text", "")


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
    form: Form = ONE_LINE
    """The texts that a text field may have, or each text of a list."""
    imports: bool = False
    """A text that may be an import path, `my_module:name` or `path/to/file.py:name`."""


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
    form: Form = ONE_LINE,
    imports: bool = False,
) -> T:
    """A dataclass field with a `Setting`. A list or dictionary as default is copied for each object.

    `low`, `high` and `outside` are the range of a number (of each number of a list) and the consequence outside it;
    `high=math.inf` is for numbers of which infinity switches something off.
    """
    limits = None if low is None else Range(low, high, outside)
    metadata = {METADATA: Setting(on_resume, limits, free_form, choices, form, imports or choices is not None)}
    field: Any
    if isinstance(default, list | dict):
        field = dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    else:
        field = dataclasses.field(default=default, metadata=metadata)
    return field  # type: ignore[no-any-return]  # dataclass turns it into the default


def setting_of(field: dataclasses.Field[Any]) -> Setting | None:
    """The metadata of a dataclass field; None where the field holds a group."""
    return field.metadata.get(METADATA)
