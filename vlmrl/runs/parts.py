"""What every rank makes of a run's config: the model, the policy, its learner. Rank 0 makes the rest (run.py)."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from vlmrl.config.model import ModelConfig
from vlmrl.config.run import RunConfig
from vlmrl.models.blocks import prepare_blocks
from vlmrl.models.checkpoints.load import load_model, resolve_checkpoint
from vlmrl.models.learning import choose_what_learns
from vlmrl.models.policy import Policy
from vlmrl.models.positions import position_function
from vlmrl.ranks.rank_group import RankGroup
from vlmrl.record.logs import MainLog
from vlmrl.record.run_dir import RunDir
from vlmrl.trainer.learner import Follower, Learner
from vlmrl.trainer.trainer import LocalTrainer

log = logging.getLogger(__name__)


def on_own_device(config: ModelConfig, group: RankGroup | None) -> ModelConfig:
    """With the GPU of this rank, where there are several."""
    if group is None or config.device == "cpu" or not torch.cuda.is_available():
        return config
    number = group.place.local_rank % torch.cuda.device_count()
    torch.cuda.set_device(number)
    return dataclasses.replace(config, device=f"cuda:{number}")


def begin(config: RunConfig) -> None:
    """Threads and seeds of a process, before anything is made."""
    torch.set_num_threads(config.trainer.threads)
    torch.manual_seed(config.seed)


def make_model(config: RunConfig, folder: Path, group: RankGroup | None) -> Any:
    """The model of the checkpoint `folder` on this rank's device, with what of it learns, its layers prepared."""
    model: Any = load_model(folder, on_own_device(config.model, group))
    torch.manual_seed(config.seed)  # whatever came before: adapters begin alike on all ranks
    choose_what_learns(model, config.model)
    prepare_blocks(model, compiled=config.trainer.compile, recomputed=config.trainer.activation_checkpointing)
    return model


def make_policy(config: RunConfig, model: Any, banned_token_ids: Sequence[int]) -> Policy:
    """The policy of that model."""
    vlm = config.model.vlm
    merge = model.config.vision_config.spatial_merge_size if vlm is not None else 1
    positions = position_function(vlm.positions if vlm is not None else "sequential", merge)
    return Policy(model, positions, banned_token_ids, feature_cache_bytes=config.trainer.feature_cache_mib << 20)


def make_trainer(
    config: RunConfig, policy: Policy, texts: tuple[str, ...], banned_token_ids: Sequence[int], group: RankGroup | None
) -> LocalTrainer:
    """Rank 0's; the other ranks make their parts of it at the same time."""

    def own() -> LocalTrainer:
        return LocalTrainer(policy, config.trainer, config.algorithm, **_sampling(config), group=group)

    if group is None:
        return own()
    return group.together("make", [(config, texts, tuple(banned_token_ids))] * (group.size - 1), own)[0]


class Following:
    """What makes the learners of a rank other than 0, one for each run, and keeps its log: `logs/rank_1.log`."""

    def __init__(self, group: RankGroup) -> None:
        self._group = group
        self._log = ExitStack()

    def make(self, config: RunConfig, texts: tuple[str, ...], banned_token_ids: tuple[int, ...]) -> Follower:
        """For `follow`."""
        self._log.close()
        logs = RunDir(config.output_dir).logs
        logs.mkdir(parents=True, exist_ok=True)
        self._log.enter_context(MainLog(logs / f"rank_{self._group.rank}.log"))
        log.info("rank %d of %d is process %d", self._group.rank, self._group.size, os.getpid())
        begin(config)
        model = make_model(config, resolve_checkpoint(config.model, texts), self._group)
        policy = make_policy(config, model, banned_token_ids)
        ranks = self._group.size
        return Follower(Learner(policy, config.trainer, config.algorithm, **_sampling(config), ranks=ranks))


def _sampling(config: RunConfig) -> dict[str, Any]:
    """What the loss must know of how it was sampled."""
    return {
        "temperature": config.orchestrator.temperature,
        "max_new_tokens": config.orchestrator.max_new_tokens,
    }
