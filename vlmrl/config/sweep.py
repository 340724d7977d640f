"""`sweep`: what a sweep does with its earlier jobs when it is run again."""

from __future__ import annotations

from dataclasses import dataclass

from vlmrl.config.fields import Resume, setting


@dataclass
class SweepConfig:
    """A sweep whose folder already holds some of its jobs (`vlmrl/cli/sweep/jobs.py`)."""

    retry_failed: bool = setting(True, on_resume=Resume.free)
    """Continue jobs that ended with an error from their newest checkpoint. With false they are only listed: a job that
    failed because of its own settings would fail again, after as long."""
