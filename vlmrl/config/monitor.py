"""`monitor`: what a run shows on the screen and logs."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class WandbMode(Enum):
    """Whether to log to Weights & Biases, and where the logs go."""

    auto = "auto"
    disabled = "disabled"
    offline = "offline"
    online = "online"


@dataclass
class WandbConfig:
    """Weights & Biases logging."""

    mode: WandbMode = WandbMode.auto
    """`offline` writes into the run directory and sends nothing; `wandb sync` uploads it later. `online` sends during
    the run. `auto` is `offline` where wandb is installed and `disabled` elsewhere; config.yaml says which."""
    project: str = "vlmrl"
    """Project on wandb.ai."""
    name: str | None = None
    """Name of the run. null: the name of the run directory."""
    group: str | None = None
    """Group that the jobs of a sweep share. null: the name of the sweep's folder; a single run has no group."""
    rollouts: int = 4
    """Rollouts of each kind (trained on, sampled, greedy) in the table of an evaluation."""
    checkpoints: bool = False
    """Log each checkpoint as an artifact. Offline, it is copied into the run directory, and `wandb sync` uploads it."""


@dataclass
class MonitorConfig:
    """What a run shows on the screen and logs."""

    live: bool = True
    """Show a live view when the output is a terminal. false: plain lines, as without a terminal."""
    record_rollouts: bool = True
    """Write rollouts/*.jsonl and images/*.png."""
    vision_gap_every: int = 10
    """Optimizer steps between two blind controls, which compare the policy's answers with and without its images
    (vision_gap/… in metrics.jsonl). The first step has one. 0: never."""
    report: bool = True
    """Write report.html after each evaluation and at the end, in a separate process."""
    wandb: WandbConfig = field(default_factory=WandbConfig)
    """Weights & Biases."""
