"""A training step of families, by one process or by several ranks. tests/unit/trainer/test_sharded_families.py runs
this script as each rank.

python sharded.py <out folder> <case>=<checkpoint folder> …
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from support.families.learning import TRAINER, Learning, learning
from vlmrl.config.algorithm import AlgorithmConfig
from vlmrl.config.trainer import Sharding, TrainerConfig
from vlmrl.ranks.commands import Command
from vlmrl.ranks.rank_group import RankGroup, follow, init_from_environment
from vlmrl.trainer.commands import Follower
from vlmrl.trainer.learner import Learner
from vlmrl.trainer.trainer import LocalTrainer
from vlmrl.types import TrainingSample, mm_token_type_ids

# With a large eps, AdamW's step varies smoothly with the gradient. Small micro-batches leave some ranks without samples
# and some without images.
CONFIG = replace(TRAINER, learning_rate=1e-2, eps=1e-2, max_grad_norm=0.5, micro_batch_tokens=60)


ALGORITHM = AlgorithmConfig(entropy_coef=0.1)
"""With a bonus, so that the gradient of the entropies is summed over the ranks, too."""


@dataclass(frozen=True)
class Case:
    """What is trained, and how the weights are held."""

    sharding: Sharding = Sharding.full
    frozen: bool = False
    """Whether what makes the features of images is frozen."""
    adapted: bool = False

    def of(self, folder: str) -> tuple[Learning, TrainerConfig]:
        family = learning(Path(folder))
        if self.frozen:
            family = family.frozen(freeze_vision=True)
        if self.adapted:
            family = family.adapted()
        return family, replace(CONFIG, sharding=self.sharding)


CASES = {
    "full": Case(),
    "frozen": Case(frozen=True),
    "kept": Case(sharding=Sharding.optimizer),
    "adapted": Case(adapted=True),
}


def batch(family: Learning) -> list[TrainingSample]:
    """The samples of the family, and one without images."""
    source = family.samples[-1]
    ids = np.concatenate([family.samples[i].token_ids[-1:] for i in (0, 1, 3)])
    text = replace(
        source,
        rollout_id="text",
        token_ids=ids,
        mm_token_type_ids=mm_token_type_ids(len(ids), ()),
        loss_mask=np.array([False, True, True]),
        advantages=np.array([0, 1, -1], np.float32),
        inference_logprobs=np.array([0, -2, -3], np.float32),
        versions=np.array([-1, 0, 0]),
        placeholders=(),
        mm_items=(),
    )
    return [*family.samples, text]


def trainer_of(case: str, folder: str, rank_group: RankGroup | None) -> LocalTrainer:
    """The trainer of a case: on rank 0 of `rank_group`, or in a run of one process."""

    def own() -> LocalTrainer:
        family, config = CASES[case].of(folder)
        return LocalTrainer(
            family.policy(), config, ALGORITHM, temperature=1.0, max_new_tokens=8, rank_group=rank_group
        )

    if rank_group is None:
        return own()
    return rank_group.together([BuildLearner(case, folder)] * (rank_group.size - 1), own)[0]


@dataclass(frozen=True)
class BuildLearner(Command[Follower, None]):
    """Build the learner of a case on a rank other than 0."""

    case: str
    folder: str

    def run(self, worker: Follower) -> None:
        worker.build(self._learner)

    def _learner(self) -> Learner:
        family, config = CASES[self.case].of(self.folder)
        ranks = torch.distributed.get_world_size()
        return Learner(family.policy(), config, ALGORITHM, temperature=1.0, max_new_tokens=8, ranks=ranks)


def step(trainer: LocalTrainer, samples: list[TrainingSample]) -> dict[str, np.ndarray]:
    """Loss and gradient norm of a step, the logprobs after it, and the weights."""
    metrics = trainer.train_step(samples).metrics
    found = {key: np.array(metrics[key]) for key in ("loss", "grad_norm", "entropy", "mismatch_kl/mean")}
    found["logprobs"] = np.concatenate(trainer.logprobs(samples))
    found |= {f"weights/{key}": weight.detach().float().numpy() for key, weight in trainer.weights().items()}
    return found


def main(out: str, *cases: str) -> int:
    torch.set_num_threads(1)
    with init_from_environment() as rank_group:
        if rank_group is not None and rank_group.rank > 0:
            return follow(rank_group, Follower())
        for each in cases:
            case, _, folder = each.partition("=")
            samples = batch(learning(Path(folder)))
            found = step(trainer_of(case, folder, rank_group), samples)
            np.savez(Path(out) / f"{case} {Path(folder).name}.npz", **found)  # type: ignore[arg-type]
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
