"""RunConfig, the root schema. Every group's dataclass lives with its owner (`vlmrl/<group>/config.py`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING

from vlmrl.inference.config import InferenceConfig
from vlmrl.models.config import ModelConfig
from vlmrl.monitor.config import MonitorConfig
from vlmrl.orchestrator.config import AlgorithmConfig, OrchestratorConfig
from vlmrl.tasks.config import TaskConfig
from vlmrl.trainer.config import TrainerConfig
from vlmrl.weight_sync.config import WeightSyncConfig


class Mode(Enum):
    """What the command does."""

    rl = "rl"
    sft = "sft"
    eval = "eval"


@dataclass
class RunConfig:
    """One run."""

    defaults: list[Any] = field(default_factory=lambda: ["_self_"])
    mode: Mode = Mode.rl
    seed: int = 0
    """Of problems, sampling and everything random but the tiny checkpoint's weights (`model.tiny.seed`)."""
    resume: str | None = None
    """A run folder to continue; its config.yaml is taken, overrides apply on top."""
    output_dir: str = MISSING
    """The run's own folder; Hydra fills it in (`outputs/<date>/<time>_<model>_<task>`)."""
    model: ModelConfig = MISSING
    task: TaskConfig = MISSING
    orchestrator: OrchestratorConfig = MISSING
    algorithm: AlgorithmConfig = MISSING
    inference: InferenceConfig = MISSING
    trainer: TrainerConfig = MISSING
    weight_sync: WeightSyncConfig = MISSING
    monitor: MonitorConfig = MISSING
