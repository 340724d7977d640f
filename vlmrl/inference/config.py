"""`inference`: the sampler. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING


@dataclass
class InferenceConfig:
    """What every engine has."""

    kind: str = MISSING
    """Which engine; said by its schema, chosen with `inference=`."""
    max_model_len: int = 1024
    """Tokens of prompt plus completion."""


@dataclass
class EmbeddedConfig(InferenceConfig):
    """The policy generates in the trainer's own process, from the trainer's own weights; no server, no copy."""

    kind: str = "embedded"
    """The engine in the trainer's own process."""
