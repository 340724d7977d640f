"""One check to one verdict: a check that raises has failed."""

from __future__ import annotations

import logging
from collections.abc import Callable

from vlmrl.runs.verdicts import Verdict, failed

log = logging.getLogger(__name__)


def verdict_of(name: str, check: Callable[..., Verdict], *evidence: object) -> Verdict:
    """The verdict of `check(name, *evidence)`. Where it raises, the traceback is in the log."""
    try:
        return check(name, *evidence)
    except Exception as error:  # the other checks are still useful
        log.exception("%s", name)
        return raised(name, error)


def raised(name: str, error: Exception) -> Verdict:
    """The verdict where an error took the place of a finding."""
    return failed(name, " ".join(f"{type(error).__name__}: {error}".split()))
