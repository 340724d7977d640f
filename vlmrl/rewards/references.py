"""The texts that an answer may equal."""

from __future__ import annotations

from vlmrl.rewards.base import Attempt


def references_of(attempt: Attempt) -> list[str]:
    """The references of an attempt as texts: the entries of a list, else the one reference, else none."""
    given = attempt.reference
    entries = given if isinstance(given, list | tuple) else [given]
    return [str(entry) for entry in entries if entry is not None]
