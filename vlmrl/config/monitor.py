"""`monitor`: what a run shows and leaves. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class WandbMode(Enum):
    """Weights & Biases."""

    disabled = "disabled"
    offline = "offline"
    online = "online"


@dataclass
class WandbConfig:
    """Weights & Biases logging."""

    mode: WandbMode = WandbMode.offline
    """`offline` writes under the run folder and sends nothing; `wandb sync` uploads it later."""
    project: str = "vlmrl"
    """Project on wandb.ai."""
    name: str | None = None
    """None: the run folder's name."""
    group: str | None = None
    """What the runs of a sweep stand together under; None: the sweep's folder, and none for a single run."""
    rollouts: int = 4
    """Rollouts of each kind (trained on, sampled, greedy) in the table of an evaluation."""
    checkpoints: bool = False
    """Log each checkpoint as an artifact. Offline it is copied into the run folder, to be uploaded by `wandb sync`."""


@dataclass
class MonitorConfig:
    """What a run shows and leaves."""

    live: bool = True
    """A live view when the output is a terminal; plain lines otherwise or when false."""
    record_rollouts: bool = True
    """Write rollouts/step_*.jsonl and images/*.png."""
    vision_gap_every: int = 10
    """Optimizer steps between two blind controls (orchestrator/vision_gap.py), from the first step on; 0: never."""
    report: bool = True
    """Write report.html after each evaluation and at the end, in a process of its own."""
    wandb: WandbConfig = field(default_factory=WandbConfig)
    """Weights & Biases."""
