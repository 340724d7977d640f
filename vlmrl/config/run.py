"""RunConfig, the root of the schema.

Each group of conf/ has a file of dataclasses next to this one; YAML files in conf/ hold choices only.

    command line ─▶ Hydra composes conf/ against the schema ─▶ parse: DictConfig to RunConfig ─▶ preflight: check

While composing, the schema refuses wrong types, unknown keys and unknown choices.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from vlmrl.config.algorithm import AlgorithmConfig
from vlmrl.config.bench import BenchConfig
from vlmrl.config.clip_direction import ClipDirectionConfig
from vlmrl.config.dataset import DatasetConfig
from vlmrl.config.dpo import DPOConfig
from vlmrl.config.export import ExportConfig
from vlmrl.config.fields import ANY_TEXT, LARGEST_SEED, Resume, setting
from vlmrl.config.gymnasium import GymnasiumConfig
from vlmrl.config.inference import EmbeddedConfig, InferenceConfig, VllmConfig
from vlmrl.config.model import ModelConfig
from vlmrl.config.monitor import MonitorConfig
from vlmrl.config.orchestrator import OrchestratorConfig
from vlmrl.config.play import PlayConfig
from vlmrl.config.preview import PreviewConfig
from vlmrl.config.program import ProgramConfig
from vlmrl.config.reference import (
    EmaReferenceConfig,
    FolderReferenceConfig,
    InitialReferenceConfig,
    NoReferenceConfig,
    ReferenceConfig,
)
from vlmrl.config.reward import TERMS, RewardConfig
from vlmrl.config.serve import ServeConfig
from vlmrl.config.small_print import SmallPrintConfig
from vlmrl.config.sweep import SweepConfig
from vlmrl.config.task import ColorCodewordConfig, ImportedTaskConfig, MixtureConfig, TaskConfig
from vlmrl.config.tool import TOOLS, ToolConfig
from vlmrl.config.trainer import TrainerConfig
from vlmrl.config.verifiers import VerifiersConfig
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
    """Reinforcement learning, after a supervised warm-up where `trainer.warmup.steps` is above 0."""
    sft = "sft"
    """Supervised learning only: `trainer.warmup` is the whole run."""
    dpo = "dpo"
    """Learn from pairs of a better and a worse answer (`dpo`), from rows of a data set or from the rollouts that a run
    has recorded, after a supervised warm-up where `trainer.warmup.steps` is above 0."""
    eval = "eval"
    """Evaluate the policy on held-out problems and stop."""
    check = "check"
    """Check the task against the contract of `vlmrl.tasks.base`: prints a table; exit code 0 only if every rule holds.
    Takes neither a model nor a run folder."""
    preview = "preview"
    """Look before you train: show the first problems as the model sees them, what the rewards say of the reference
    answers, and what is wrong with the data; writes preview.html. `row=417` shows one row and scores typed answers,
    `full=true` looks at all rows. Needs no GPU; exit code 1 where something was found."""
    play = "play"
    """Play episodes yourself, or let a scripted policy play them (`play.policy`): show what the policy would see, and
    the rewards. Loads no weights; records the rollouts and writes the report. Exit code 1 where an episode failed."""
    serve = "serve"
    """Serve the policy, or with `resume` a checkpoint of a run, behind an OpenAI-style chat endpoint until Ctrl-C, for
    other people's harnesses and for trying it by hand; see the group `serve`. Records each conversation."""
    doctor = "doctor"
    """Send a few problems through renderer, engine and trainer and compare what each saw. Use it before a long run."""
    bench = "bench"
    """Take a few steps of the run as it is, and show how fast they are beside what this machine could do, what bounds
    them, and what to set. Saves no checkpoint; see the group `bench`."""
    replay = "replay"
    """Send a recorded batch (`run`, `step`) through today's code and show where it differs: a table, and
    replay.json."""
    export = "export"
    """Write the newest checkpoint of a run (`resume`) as a Hugging Face folder, for transformers and vLLM."""
    compare = "compare"
    """Make one table and one plot of earlier runs (`runs`)."""
    faults = "faults"
    """List what went wrong in a run (`run`): the faults of the task's code and data, equal ones together. With
    `rollout`, play that row again; exit code 1 if its fault happens again. Works while the run goes on."""
    report = "report"
    """Write the page of one run, or of several side by side. Takes `run=` or `runs=` and nothing else; needs no
    torch."""


LEARN = (Mode.rl, Mode.sft, Mode.dpo)
"""Modes that change weights, save them, and can be continued."""

BY_REWARD = (Mode.rl, Mode.bench)
"""Modes that roll out and learn from rewards."""

READ_A_CHECKPOINT = (Mode.eval, Mode.export, Mode.serve)
"""Modes that read a checkpoint of the run in `resume`, and add no step to it."""


@dataclass
class RunConfig:
    """One run."""

    mode: Mode = setting(Mode.rl, on_resume=Resume.free)
    """What the command does. A resumed run keeps its mode, or is evaluated, served or exported."""
    seed: int = setting(0, on_resume=Resume.refused, low=0, high=LARGEST_SEED, outside="it seeds no generator")
    """Seed of problems, sampling and everything else that is random, except the weights of the tiny checkpoint
    (`model.tiny.seed`)."""
    dry_run: bool = setting(False, on_resume=Resume.free)
    """Compose the config, check it, print what the run would take, and stop. Makes no folder and starts no process;
    exit code 0 or 2."""
    resume: str | None = setting(None, on_resume=Resume.free)
    """Folder of a run to continue. The run uses its own config.yaml, with the overrides of single values on top. For
    mode=eval, mode=serve and mode=export also a checkpoint of it: `<run>/checkpoints/step_000020` or
    `<run>/checkpoints/best`."""
    run: str | None = setting(None, on_resume=Resume.refused)
    """mode=replay, mode=report, mode=faults: folder of the run. A replay uses the run's config.yaml, with overrides of
    values, engine and weight sync on top."""
    step: int | None = setting(None, on_resume=Resume.refused, low=0, high=10**9, outside="there is no such step")
    """mode=replay: the batch to replay, counted in optimizer steps from 1. mode=eval, mode=serve, mode=export: the step
    of the checkpoint that `resume=<run>/checkpoints/step_000020` names, null for the newest."""
    against: str | None = setting(None, on_resume=Resume.refused)
    """mode=doctor: an older certificate (a doctor.json, or the folder of its run). The doctor shows what has changed
    since: versions, files, settings, verdicts, and numbers beyond rounding."""
    rollout: str | None = setting(None, on_resume=Resume.refused)
    """mode=faults: the rollout or demonstration to play again, e.g. `train/000003/01/00`."""
    row: int | None = setting(None, on_resume=Resume.refused, low=0, high=10**15, outside="there is no such row")
    """mode=preview: the row to show, counted in rows of the files of task.path from 0."""
    full: bool = setting(False, on_resume=Resume.refused)
    """mode=preview: look at every row of both splits."""
    runs: list[str] = setting([], on_resume=Resume.refused)
    """mode=compare, mode=report: folders of runs and of multiruns, e.g. `[outputs/multirun/seeds]`."""
    output_dir: str = setting(MISSING, on_resume=Resume.refused, form=ANY_TEXT)
    """The run's own folder, an absolute path. It is filled in from `hydra.run.dir`:
    `outputs/<date>/<time>_<experiment>`, or `<time>_<model>_<task>` without an experiment."""
    model: ModelConfig = MISSING
    """The policy."""
    task: TaskConfig = MISSING
    """What the policy learns."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """What an answer is worth, besides what the task itself says."""
    tool: dict[str, ToolConfig] = field(default_factory=dict)
    """The tools that the policy may call before it answers, by their names."""
    orchestrator: OrchestratorConfig = MISSING
    """Rollouts and the loop."""
    algorithm: AlgorithmConfig = MISSING
    """From rewards to a loss."""
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    """A second model that scores what the policy samples: to stay near it, or to learn from it (`algorithm.kl`)."""
    dpo: DPOConfig = field(default_factory=DPOConfig)
    """Pairs of answers, and what they cost (mode=dpo)."""
    inference: InferenceConfig = MISSING
    """The engine that samples."""
    trainer: TrainerConfig = MISSING
    """Optimizer, schedule, packing and checkpoints."""
    weight_sync: WeightSyncConfig = MISSING
    """How new weights reach the inference engine."""
    monitor: MonitorConfig = MISSING
    """What a run shows and records."""
    export: ExportConfig = field(default_factory=ExportConfig)
    """Where mode=export writes."""
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    """How much mode=preview looks at."""
    play: PlayConfig = field(default_factory=PlayConfig)
    """Who plays with mode=play, and what."""
    bench: BenchConfig = field(default_factory=BenchConfig)
    """How many steps mode=bench takes."""
    serve: ServeConfig = field(default_factory=ServeConfig)
    """Where mode=serve listens."""
    sweep: SweepConfig = field(default_factory=SweepConfig)
    """What a sweep does with its earlier jobs. The sweeps themselves are in sweeps/ (`+sweep=<name>`)."""

    def __post_init__(self) -> None:
        if type(self.reference) is ReferenceConfig:  # the config of a run that is older than references names none
            self.reference = NoReferenceConfig()
        if self.mode is Mode.dpo and isinstance(self.reference, NoReferenceConfig):  # its loss needs one
            self.reference = InitialReferenceConfig()

    @property
    def reference_is_policy(self) -> bool:
        """Whether the reference is the policy without its LoRA adapters, so that there is no second copy."""
        return (
            isinstance(self.reference, InitialReferenceConfig)
            and self.model.lora is not None
            and not self.trainer.warmup.steps
            and not self.reference.refresh_every
        )


SCHEMAS: dict[str, dict[str, type]] = {
    "task": {
        "color_codeword": ColorCodewordConfig,
        "dataset": DatasetConfig,
        "gymnasium": GymnasiumConfig,
        "small_print": SmallPrintConfig,
        "clip_direction": ClipDirectionConfig,
        "mixture": MixtureConfig,
        "imported": ImportedTaskConfig,
        "program": ProgramConfig,
        "verifiers": VerifiersConfig,
    },
    "reward": {**TERMS},
    "tool": {**TOOLS},
    "reference": {
        "none": NoReferenceConfig,
        "initial": InitialReferenceConfig,
        "folder": FolderReferenceConfig,
        "ema": EmaReferenceConfig,
    },
    "inference": {"embedded": EmbeddedConfig, "vllm": VllmConfig},
    "weight_sync": {
        "in_process": InProcessSyncConfig,
        "folder": FolderSyncConfig,
        "nccl": NcclSyncConfig,
        "cuda_ipc": CudaIpcSyncConfig,
    },
}
"""Mixed groups, whose options differ in their fields: group → `kind` → schema. A schema's `kind` is its default."""

PLACED = {"reward.terms.*": "reward", "tool.*": "tool", "orchestrator.eval.sets.*": "eval_set"}
"""Groups whose options stand elsewhere than under the group's own name: place → group. `*` is the name of an entry."""


def schemas_of(base: type) -> dict[str, type]:
    """The schemas by `kind` of a field whose type is `base`; empty where `base` is not the base of a mixed group.

    It goes by type and not by name, so it also finds a mixed group that lies deeper than in the root.

    >>> list(schemas_of(TaskConfig))[:4], schemas_of(ModelConfig)
    (['color_codeword', 'dataset', 'gymnasium', 'small_print'], {})
    """
    group = group_of(base)
    return SCHEMAS[group] if group is not None else {}


def group_of(base: type) -> str | None:
    """The mixed group whose schemas derive from `base`; None where there is none.

    >>> group_of(TaskConfig), group_of(ModelConfig)
    ('task', None)
    """
    return next(
        (group for group, kinds in SCHEMAS.items() if all(base in kind.__bases__ for kind in kinds.values())), None
    )
