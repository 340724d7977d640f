"""`sweep`: what becomes of a sweep's jobs when it is run again. No torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class SweepConfig:
    """A multirun whose folder already holds some of its jobs (vlmrl/cli/sweep/jobs.py)."""

    retry_failed: bool = True
    """Continue jobs that ended by an error from their newest checkpoint. False only lists them: what failed by itself
    may fail again, after as long."""
