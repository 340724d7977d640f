"""`export`: where mode=export writes the checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from vlmrl.config.fields import Resume, setting


class ExportedWeights(Enum):
    """Which weights of a checkpoint are exported."""

    policy = "policy"
    """Those that the policy sampled with."""
    average = "average"
    """Their moving average (`trainer.ema`)."""


@dataclass
class ExportConfig:
    """mode=export writes the newest checkpoint of a run as a Hugging Face folder."""

    folder: str | None = setting(None, on_resume=Resume.free)
    """The folder to write; None is `export/step_000020` in the run's folder. It must not exist yet."""
    weights: ExportedWeights = setting(ExportedWeights.policy, on_resume=Resume.free)
    """The policy's weights, or their moving average."""
