"""`weight_sync`: how a policy version reaches the engine. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING


@dataclass
class WeightSyncConfig:
    """What every way of publishing has."""

    kind: str = MISSING
    """Which one; said by its schema, chosen with `weight_sync=`, and by `inference=` for most runs."""


@dataclass
class InProcessSyncConfig(WeightSyncConfig):
    """The embedded engine reads the trainer's own weights: nothing travels."""

    kind: str = "in_process"
    """For `inference=embedded` only."""


@dataclass
class FolderSyncConfig(WeightSyncConfig):
    """Through a folder that trainer and servers both see: one safetensors file per version, read by vLLM in place."""

    kind: str = "folder"
    """`folder`: works for every engine, CPU or GPU, on this machine or, over a network disk, on others."""
    root: str = "/dev/shm"
    """Where the run makes its folder, which holds one or two copies of the weights. Shared memory by default, because
    a disk would be the slowest part of a step; for servers on other machines, a folder that they see too."""
    verify: bool = False
    """Compare the SHA-256 of every weight in every server with the trainer's after each publish. Reads all weights
    twice, so it is for finding out whether a set-up works, not for every step."""
