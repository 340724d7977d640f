"""`preview`: how much mode=preview looks at."""

from __future__ import annotations

from dataclasses import dataclass

from vlmrl.config.fields import Resume, setting


@dataclass
class PreviewConfig:
    """mode=preview shows what a run would train on."""

    problems: int = setting(256, on_resume=Resume.refused, low=1, high=10**9, outside="there is no problem to look at")
    """Problems of each split that are drawn and rendered. `full=true` takes all of them."""
    answers: int = setting(
        4, on_resume=Resume.refused, low=0, high=10**4, outside="it is not a number of answers (0 loads no model)"
    )
    """Problems that the model answers as it is now. 0 loads no weights."""
