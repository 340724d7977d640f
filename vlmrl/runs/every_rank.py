"""What every rank of a run builds: its model, its policy, its learner, and the parts with which it samples.

rank 0    make_model ─▶ make_policy ─▶ make_trainer ── BuildLearner ──▶ rank r: RunFollower.make_learner
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vlmrl.config.inference import VllmConfig
from vlmrl.config.model import Init, ModelConfig
from vlmrl.config.run import RunConfig
from vlmrl.config.trainer import Sharding
from vlmrl.inference.embedded.generator import Generator
from vlmrl.inference.embedded.ranked import Answered, RankSampler, SampleShare
from vlmrl.models.blocks import prepare_blocks
from vlmrl.models.checkpoints.load import load_model, resolve_checkpoint, resolve_device
from vlmrl.models.compiling import start_compilers
from vlmrl.models.families import family_of
from vlmrl.models.lora import is_quantized, select_trainable
from vlmrl.models.parts import assert_rates_reach
from vlmrl.models.policy import Policy
from vlmrl.models.trial import code_of, try_policy
from vlmrl.ranks.commands import Command
from vlmrl.ranks.rank_group import RankGroup
from vlmrl.record.logs import MainLog
from vlmrl.record.run_dir import RunDir
from vlmrl.runs.reference import make_reference, scored_algorithm
from vlmrl.trainer.commands import Follower
from vlmrl.trainer.learner import Learner
from vlmrl.trainer.trainer import LocalTrainer

log = logging.getLogger(__name__)


def on_own_device(config: ModelConfig, rank_group: RankGroup | None) -> ModelConfig:
    """The model's config with `device` set to this rank's GPU; unchanged without a rank group or without a GPU."""
    if rank_group is None or config.device == "cpu" or not torch.cuda.is_available():
        return config
    number = rank_group.place.local_rank % torch.cuda.device_count()
    torch.cuda.set_device(number)
    return dataclasses.replace(config, device=f"cuda:{number}")


def seed_process(config: RunConfig) -> None:
    """Set this process's torch threads and torch seed. Call it before anything else is built."""
    torch.set_num_threads(config.trainer.threads)
    torch.manual_seed(config.seed)


def make_model(config: RunConfig, folder: Path, rank_group: RankGroup | None) -> Any:
    """Load the checkpoint in `folder` onto this rank's device, select its trainable parameters, prepare its layers."""
    placed = on_own_device(config.model, rank_group)
    device = resolve_device(placed)
    start_compilers(device)
    if is_quantized(config.model) and not (placed.init is Init.random and placed.tiny is None):
        placed = dataclasses.replace(placed, device="cpu")  # a layer reaches the device in 4 bits
    model: Any = load_model(folder, placed)
    torch.manual_seed(config.seed)  # again, so that new LoRA adapters start equal on every rank
    select_trainable(model, config.model, device)
    model.to(device)
    assert_rates_reach(config.trainer.part_rates, model)
    prepare_blocks(model, compiled=config.trainer.compile is True, recomputed=config.trainer.activation_checkpointing)
    return model


def make_policy(config: RunConfig, model: Any, banned_token_ids: Sequence[int]) -> Policy:
    """The policy that computes with `model`. It never samples `banned_token_ids`. Raises `ModelError` where it does not
    compute what the model computes (models/trial.py)."""
    positions = family_of(config.model.vlm).position_function(model.config)
    with code_of(model):
        policy = Policy(model, positions, banned_token_ids, feature_cache_bytes=config.trainer.feature_cache_mib << 20)
    try_policy(policy)
    return policy


def make_trainer(
    config: RunConfig,
    policy: Policy,
    folder: Path,
    texts: tuple[str, ...],
    banned_token_ids: Sequence[int],
    rank_group: RankGroup | None,
) -> LocalTrainer:
    """Rank 0's trainer. The other ranks build their learners at the same time (`BuildLearner`). `folder`: the policy's
    checkpoint."""

    def own() -> LocalTrainer:
        reference = make_reference(config, on_own_device(config.model, rank_group), folder, policy, banned_token_ids)
        algorithm = scored_algorithm(config)
        return LocalTrainer(
            policy,
            config.trainer,
            algorithm,
            **_sampling(config),
            rank_group=rank_group,
            reference=reference,
            seed=config.seed,
        )

    if rank_group is None:
        return own()
    command = BuildLearner(config, texts, tuple(banned_token_ids))
    return rank_group.together([command] * (rank_group.size - 1), own)[0]


class RunFollower(Follower):
    """The state of a rank other than 0: the learner of the current run, and that rank's log, e.g. `logs/rank_1.log`."""

    def __init__(self, rank_group: RankGroup) -> None:
        super().__init__()
        self._rank_group = rank_group
        self._log = ExitStack()
        self._sampler: RankSampler | None = None

    def make_room(self) -> None:
        if self._sampler is not None:
            self._sampler.clear()

    def sample(self, share: SampleShare) -> Answered:
        """This rank's share of a batch of the embedded engine."""
        sampler = self._sampler
        assert sampler is not None, "only the embedded engine samples on all ranks"
        return self.learner.sample(lambda: sampler.sample(share))

    def make_learner(self, config: RunConfig, texts: tuple[str, ...], banned_token_ids: tuple[int, ...]) -> Learner:
        """The learner for the run `config`. A sweep calls this once per job; the log of the job before is closed."""
        self._log.close()
        self._sampler = None  # it holds the model of the job before
        logs = RunDir(config.output_dir).logs
        logs.mkdir(parents=True, exist_ok=True)
        self._log.enter_context(MainLog(logs / f"rank_{self._rank_group.rank}.log"))
        log.info("rank %d of %d is process %d", self._rank_group.rank, self._rank_group.size, os.getpid())
        seed_process(config)
        folder = resolve_checkpoint(config.model, texts)
        model = make_model(config, folder, self._rank_group)
        policy = make_policy(config, model, banned_token_ids)
        if not isinstance(config.inference, VllmConfig):
            moves = config.trainer.sharding is not Sharding.none
            self._sampler = RankSampler(Generator(policy), weights_move=moves)
        placed = on_own_device(config.model, self._rank_group)
        return Learner(
            policy,
            config.trainer,
            scored_algorithm(config),
            **_sampling(config),
            ranks=self._rank_group.size,
            reference=make_reference(config, placed, folder, policy, banned_token_ids),
        )


@dataclass(frozen=True)
class BuildLearner(Command[RunFollower, None]):
    """Build the learner of a run on a rank other than 0."""

    config: RunConfig
    texts: tuple[str, ...]
    banned_token_ids: tuple[int, ...]

    def run(self, worker: RunFollower) -> None:
        worker.build(lambda: worker.make_learner(self.config, self.texts, self.banned_token_ids))


def _sampling(config: RunConfig) -> dict[str, Any]:
    """The sampling settings that the loss needs."""
    return {
        "temperature": config.orchestrator.temperature,
        "max_new_tokens": config.orchestrator.max_new_tokens,
    }
