"""RunConfig, the root schema.

Every group has a file of dataclasses beside this one; YAML files in conf/ hold choices only.

    command line ─▶ Hydra composes conf/ against the schemas ─▶ parse: DictConfig to RunConfig ─▶ preflight

Types, unknown keys and enum values are refused by the schemas while composing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from vlmrl.config.algorithm import AlgorithmConfig
from vlmrl.config.export import ExportConfig
from vlmrl.config.inference import EmbeddedConfig, InferenceConfig, VllmConfig
from vlmrl.config.model import ModelConfig
from vlmrl.config.monitor import MonitorConfig
from vlmrl.config.orchestrator import OrchestratorConfig
from vlmrl.config.sweep import SweepConfig
from vlmrl.config.task import ColorCodewordConfig, ImportedTaskConfig, TaskConfig
from vlmrl.config.trainer import TrainerConfig
from vlmrl.config.weight_sync import (
    CudaIpcSyncConfig,
    FolderSyncConfig,
    InProcessSyncConfig,
    NcclSyncConfig,
    WeightSyncConfig,
)


class Mode(Enum):
    """What the command does."""

    rl = "rl"
    """A supervised warm-up where `trainer.warmup.steps` asks for one, then reinforcement learning."""
    sft = "sft"
    """Supervised learning only: `trainer.warmup` is the whole run."""
    eval = "eval"
    """Held-out evaluation of the policy as it is."""
    check = "check"
    """The task against the contract of `vlmrl.tasks.base`: a table, and exit code 0 only if every rule holds. Takes
    neither a model nor a run folder."""
    doctor = "doctor"
    """A few problems through renderer, engine and trainer: do they agree? To be asked before a long run."""
    replay = "replay"
    """A recorded batch (`run`, `step`) through today's code: where does it differ? A table, and replay.json."""
    export = "export"
    """The newest checkpoint of a run (`resume`) as a Hugging Face folder, for transformers and vLLM."""
    compare = "compare"
    """One table and one plot of runs that were made before (`runs`)."""
    report = "report"
    """The page of a run, or of several side by side. Takes `run=` or `runs=` and nothing else; no torch."""


@dataclass
class RunConfig:
    """One run."""

    mode: Mode = Mode.rl
    """What the command does."""
    seed: int = 0
    """Seed of problems, sampling and everything random but the tiny checkpoint's weights (`model.tiny.seed`)."""
    dry_run: bool = False
    """Compose, check, print what the run would take, and stop: no folder, no process, exit code 0 or 2."""
    resume: str | None = None
    """A run folder to continue; its config.yaml is taken, overrides of single values apply on top."""
    run: str | None = None
    """mode=replay, mode=report: the run folder. For a replay its config.yaml is taken, overrides of values, engine and
    weight sync on top."""
    step: int | None = None
    """mode=replay: the batch that is replayed, counted in optimizer steps from 1."""
    runs: list[str] = field(default_factory=list)
    """mode=compare, mode=report: folders of runs and of multiruns, e.g. `[outputs/multirun/seeds]`."""
    output_dir: str = MISSING
    """The run's own folder, absolute; filled in from `hydra.run.dir` (`outputs/<date>/<time>_<model>_<task>`, or
    `<time>_<experiment>`)."""
    model: ModelConfig = MISSING
    """The policy."""
    task: TaskConfig = MISSING
    """What is learned."""
    orchestrator: OrchestratorConfig = MISSING
    """Rollouts and the loop."""
    algorithm: AlgorithmConfig = MISSING
    """From rewards to a loss."""
    inference: InferenceConfig = MISSING
    """The sampler."""
    trainer: TrainerConfig = MISSING
    """The learner."""
    weight_sync: WeightSyncConfig = MISSING
    """How a policy version reaches the sampler."""
    monitor: MonitorConfig = MISSING
    """What a run shows and leaves."""
    export: ExportConfig = field(default_factory=ExportConfig)
    """Where mode=export writes to."""
    sweep: SweepConfig = field(default_factory=SweepConfig)
    """What becomes of a sweep's jobs when it is run again. The sweeps themselves are in sweeps/ (`+sweep=<name>`)."""


SCHEMAS: dict[str, dict[str, type]] = {
    "task": {"color_codeword": ColorCodewordConfig, "imported": ImportedTaskConfig},
    "inference": {"embedded": EmbeddedConfig, "vllm": VllmConfig},
    "weight_sync": {
        "in_process": InProcessSyncConfig,
        "folder": FolderSyncConfig,
        "nccl": NcclSyncConfig,
        "cuda_ipc": CudaIpcSyncConfig,
    },
}
"""Groups whose options differ in their fields: option → schema. Elsewhere RunConfig's field has the schema."""
