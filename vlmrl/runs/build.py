"""The parts of a run, built once, in the order of the data path.

    every rank    seed_process ─▶ make_model ─▶ make_policy ─▶ learner      (every_rank.py)
    rank 0 only   task ─▶ checkpoint ─▶ renderer ─▶ trainer ─▶ engine and weight sync ─▶ evaluator ─▶ Run

Every rank holds the model and its own learner. Rank 0 also renders, samples, scores and records.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vlmrl.config.inference import VllmConfig
from vlmrl.config.model import Init, VLMConfig, most_frames
from vlmrl.config.orchestrator import TEMPLATE, RendererConfig
from vlmrl.config.run import RunConfig
from vlmrl.config.task import most_turns
from vlmrl.models.checkpoints.load import (
    load_eos_ids,
    load_image_processor,
    load_processor,
    load_tokenizer,
    resolve_checkpoint,
)
from vlmrl.models.checkpoints.scratch import write_weights
from vlmrl.models.checkpoints.video_processor import load_video_processor
from vlmrl.models.families import family_of
from vlmrl.models.policy import Policy
from vlmrl.models.vision_encoder import encodes
from vlmrl.monitor.monitor import Monitor
from vlmrl.orchestrator.best import BestWatch
from vlmrl.orchestrator.curriculum import Curriculum
from vlmrl.orchestrator.envs.make import make_envs
from vlmrl.orchestrator.evaluation import Evaluator
from vlmrl.orchestrator.programs.chat import EndpointOfRun
from vlmrl.orchestrator.rollout import RolloutRunner
from vlmrl.orchestrator.sampling import Truncation
from vlmrl.orchestrator.scoring import Scorer
from vlmrl.orchestrator.stream import FixedProblems
from vlmrl.orchestrator.task_threads import TaskThreads
from vlmrl.preflight.rules.video import rows_are_shown
from vlmrl.ranks.rank_group import RankGroup
from vlmrl.record.run_dir import RunDir
from vlmrl.rendering.renderer import FamilyRenderer, Renderer, make_renderer, renderer_name
from vlmrl.runs.doctor.short import ensure_certified
from vlmrl.runs.engines import make_engine
from vlmrl.runs.eval_sets import make_set_players, scored_evaluation
from vlmrl.runs.every_rank import make_model, make_policy, make_trainer, seed_process
from vlmrl.runs.fence import files_of
from vlmrl.runs.position import Cursors, Position
from vlmrl.runs.problems import ProblemSource, make_curriculum, max_model_len, steps_of
from vlmrl.runs.stopping import Stop
from vlmrl.runs.tools import describe_tools, make_toolbox, texts_of_run
from vlmrl.tasks.base import Task
from vlmrl.tasks.border import get_num_rows
from vlmrl.tasks.loading import load_task
from vlmrl.trainer.checkpoint import Checkpoints
from vlmrl.trainer.trainer import LocalTrainer
from vlmrl.types import ImageItem, InferenceEngine, WeightSync

log = logging.getLogger(__name__)


class Progress(NamedTuple):
    """How far a run has come. Two equal values mean that nothing new needs saving."""

    policy_version: int
    supervised_steps: int
    evaluations: int

    def __str__(self) -> str:
        """`step 3`, or `supervised step 5` before the first RL step."""
        return f"step {self.policy_version}" if self.policy_version else f"supervised step {self.supervised_steps}"


@dataclass(eq=False)
class Run:
    """The parts of one run on rank 0. Each mode is a function of a `Run` (see modes.py)."""

    config: RunConfig
    run_dir: RunDir
    monitor: Monitor
    task: Task
    renderer: Renderer
    problems: ProblemSource
    """The problems of the run's task."""
    steps: int
    """The most steps of the run: RL steps, or supervised steps with mode=sft."""
    curriculum: Curriculum | None
    """Chooses the training problems."""
    policy: Policy
    trainer: LocalTrainer
    engine: InferenceEngine
    weight_sync: WeightSync
    evaluator: Evaluator
    checkpoints: Checkpoints
    rank_group: RankGroup | None
    """None: the run is one process."""
    stop: Stop = field(init=False, default_factory=Stop)
    """Set when the run is to finish its step, save and end."""
    position: Position = field(init=False)
    """The next problems."""
    restored_step: int = field(init=False, default=0)
    """The step in the name of the checkpoint that the run was restored from; 0 without one."""
    begun: Progress = field(init=False, default=Progress(0, 0, 0))
    """The progress with which this process began: that of the checkpoint it was restored from."""
    saved: Progress | None = field(init=False, default=None)
    """The progress that the newest checkpoint holds; None before the first checkpoint."""

    def __post_init__(self) -> None:
        self.position = Position(Cursors.of(self.config))

    @property
    def progress(self) -> Progress:
        """How far the run has come."""
        return Progress(self.trainer.version, self.trainer.supervised_steps, self.evaluator.count)

    @property
    def is_whole(self) -> bool:
        """Whether the weights, the evaluations and what is recorded belong to the same finished step. A checkpoint of
        anything else could not be continued as if the run had never stopped."""
        done = (begun + count for begun, count in zip(self.begun, self.monitor.recorded, strict=True))
        return self.trainer.is_between_steps and self.progress == Progress(*done)


# ── what rank 0 builds ──────────────────────────────────────────────────────────────────────────────────────


def build_run(config: RunConfig, run_dir: RunDir, monitor: Monitor, rank_group: RankGroup | None = None) -> Run:
    """Build every part of a run; the engine is not started yet."""
    seed_process(config)
    task = load_task(config.task, seed=config.seed)
    rows_are_shown(config, task)
    texts = texts_of_run(config, task)
    folder = checkpoint = resolve_checkpoint(config.model, texts)
    model = make_model(config, folder, rank_group)
    renderer = make_run_renderer(config, folder, model, monitor)
    if config.model.init is Init.random and isinstance(config.inference, VllmConfig):
        folder = write_weights(model, folder, run_dir.path / "initial_model")
    policy = make_policy(config, model, renderer.banned_token_ids)
    # Before the trainer, which may divide the weights among the ranks.
    ensure_certified(config, checkpoint, policy, renderer, run_dir, monitor)
    trainer = make_trainer(config, policy, checkpoint, texts, renderer.banned_token_ids, rank_group)
    engine, weight_sync = make_engine(config, folder, policy, trainer, renderer, run_dir, monitor)
    envs = make_envs(config.task, task, EndpointOfRun.of(config), seed=config.seed, logs=run_dir.logs)
    runner = RolloutRunner(
        envs=envs,
        renderer=renderer,
        engine=engine,
        seed=config.seed,
        max_turns=most_turns(config.task),
        max_new_tokens=config.orchestrator.max_new_tokens,
        max_model_len=max_model_len(config),
        max_frames=most_frames(config.model),
        truncated=config.algorithm.truncated,
        truncation=Truncation.of(config),
        stop=tuple(config.orchestrator.stop),
        scorer=Scorer.of(config.reward, config.task, TaskThreads().run),
        tools=make_toolbox(config),
    )
    problems = ProblemSource.of(config, config.task, envs, renderer, monitor)
    num_rows = get_num_rows(task, "train")
    held_out = FixedProblems(problems.stream("eval", "eval", once=True))
    return Run(
        config=config,
        run_dir=run_dir,
        monitor=monitor,
        task=task,
        renderer=renderer,
        problems=problems,
        steps=steps_of(config, num_rows),
        curriculum=make_curriculum(config, num_rows),
        policy=policy,
        trainer=trainer,
        engine=engine,
        weight_sync=weight_sync,
        evaluator=Evaluator(
            scored_evaluation(config),
            runner,
            held_out,
            config.orchestrator.temperature,
            sets=make_set_players(config, runner, problems, monitor, run_dir.logs),
            best=BestWatch(config.trainer.keep_best, config.trainer.patience),
        ),
        checkpoints=Checkpoints(RunDir(config.output_dir).checkpoints, config.trainer.keep_checkpoints),
        rank_group=rank_group,
    )


def make_run_renderer(config: RunConfig, folder: Path, model: Any, monitor: Monitor) -> Renderer:
    """The renderer with the tokenizer and image processor in `folder`. The monitor spells recorded tokens with that
    tokenizer."""
    parts = build_renderer(config, folder, model)
    monitor.spell_with(parts.tokenizer)
    for sentence in parts.surprises:
        monitor.warn(sentence)
    return parts.renderer


@dataclass(frozen=True)
class RenderingParts:
    """The renderer without the model, and what people need to look at prompts."""

    renderer: FamilyRenderer
    tokenizer: Any
    processed_pixels: Callable[[ImageItem], np.ndarray | None]
    """uint8 [H, W, 3]: an image as the processor made it; None where that cannot be shown."""
    surprises: tuple[str, ...]
    """What the chat format does beyond writing the messages down, as sentences for people."""


def build_renderer(config: RunConfig, folder: Path, model: Any = None) -> RenderingParts:
    """The renderer with the tokenizer and processor in `folder`. Without the `model`, its embedding counts as large as
    the tokenizer, and images that it would not encode are not refused. Raises VlmrlError and OSError."""
    settings = config.orchestrator.renderer
    assert settings is not None, "preflight refuses a config without a renderer"
    with files_of(folder):
        return _build_renderer(config, settings, folder, model)


def _load_video_processor(folder: Path, vlm: VLMConfig | None) -> Any:
    assert vlm is not None, "a text-only model takes no videos"
    assert vlm.video is not None, "the renderer refuses videos of other families"
    return load_video_processor(folder, vlm.video)


def _build_renderer(config: RunConfig, settings: RendererConfig, folder: Path, model: Any) -> RenderingParts:
    tokenizer = load_tokenizer(folder)
    by_template = renderer_name(settings, config.model) == TEMPLATE
    vlm = config.model.vlm
    processor = load_processor(folder, vlm) if by_template and vlm is not None else None
    image_processor = processor.image_processor if processor is not None else None
    if vlm is not None and not by_template:
        image_processor = load_image_processor(folder, vlm)
    family = family_of(config.model.vlm)
    renderer = make_renderer(
        settings,
        config.model,
        tokenizer,
        image_processor,
        len(tokenizer) if model is None else model.get_input_embeddings().num_embeddings,
        family.placeholder_tokens,
        family.processed_size,
        processor=processor,
        load_video_processor=partial(_load_video_processor, folder, vlm),
        eos_ids=load_eos_ids(folder) if by_template else (),
    )
    if vlm is not None and model is not None:
        renderer.try_image(lambda images: encodes(model, images))
    describe_tools(renderer, config)
    return RenderingParts(
        renderer,
        tokenizer,
        lambda image: family.processed_pixels(image.mm_kwargs, image_processor),
        renderer.surprises,
    )
