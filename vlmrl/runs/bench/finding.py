"""A piece of advice, and what all rules that give one have in common."""

from __future__ import annotations

from dataclasses import dataclass

from vlmrl.runs.bench.measured import Measured

STANDS_OUT = 0.1
"""A part of a step below this share is left alone."""

FULL = 0.9
"""Share of the trainer's memory that advice may fill: the allocator needs the rest."""


@dataclass(frozen=True)
class Advice:
    """A piece of advice."""

    seconds: float
    """Of a step: the part that it is about, not what it will save."""
    finding: str
    """A sentence with the number that convinced us."""
    settings: tuple[str, ...]
    """`key=value` each. Empty where no key helps."""


def percent(found: Measured, seconds: float) -> str:
    """The share of a step, in words."""
    return f"{found.share(seconds):.0%} of a step"


def stands_out(found: Measured, seconds: float) -> bool:
    return found.share(seconds) >= STANDS_OUT


def gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"
