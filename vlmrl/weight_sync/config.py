"""`weight_sync`: how a policy version reaches the engine. No torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class WeightSyncConfig:
    """How a policy version reaches the engine."""

    kind: str = "in_process"
    """`in_process`: the engine reads the trainer's own weights (embedded only)."""
