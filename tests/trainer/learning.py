"""Two steps of learning, by one process or by ranks: run by test_ranks.py as each rank, and called by it for one.

python learning.py <checkpoint folder> <out folder> <case> …
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import torch
from helpers import END, Part, Sampled, image, sample

from vlmrl.models.load import load_model
from vlmrl.models.policy import Policy
from vlmrl.models.positions import position_function
from vlmrl.orchestrator.config import AlgorithmConfig
from vlmrl.trainer.checkpoint import Checkpoints
from vlmrl.trainer.config import Optimizer, Packing, SFTConfig, Sharding, TrainerConfig
from vlmrl.trainer.distributed import Group, follow, init_from_environment
from vlmrl.trainer.learner import Follower, Learner
from vlmrl.trainer.trainer import LocalTrainer
from vlmrl.types import TrainingSample

CONFIG = TrainerConfig(
    max_steps=10,
    learning_rate=1e-2,
    # AdamW's first step is nearly the gradient's sign; with a large eps it is as smooth as the gradient.
    eps=1e-2,
    weight_decay=0.1,
    max_grad_norm=0.5,
    warmup=SFTConfig(rl_weight=0.3),
)
SYSTEM = list(range(100, 120))


@dataclass(frozen=True)
class Case:
    """How the same two steps are computed."""

    packing: Packing = Packing.tree
    micro_batch_tokens: int = 16384
    sharding: Sharding = Sharding.full
    freeze_vision: bool = False
    freeze_language: bool = False
    images: bool = True
    """Whether any sample of the batch shows one."""
    dtype: torch.dtype = torch.float32
    optimizer: Optimizer = Optimizer.adamw


CASES = {
    "whole": Case(),
    "small": Case(micro_batch_tokens=60),
    "one by one": Case(packing=Packing.none),
    "side by side": Case(packing=Packing.varlen, micro_batch_tokens=100),
    "frozen": Case(micro_batch_tokens=60, freeze_vision=True),
    "tower alone": Case(packing=Packing.none, freeze_language=True),
    "text": Case(micro_batch_tokens=60, images=False),
    "replicated": Case(micro_batch_tokens=60, sharding=Sharding.none),
    "replicated one by one": Case(packing=Packing.none, sharding=Sharding.none),
    "bfloat16": Case(micro_batch_tokens=60, dtype=torch.bfloat16),
    "replicated bfloat16": Case(micro_batch_tokens=60, sharding=Sharding.none, dtype=torch.bfloat16),
    "float16": Case(micro_batch_tokens=60, dtype=torch.float16),
    "replicated float16": Case(micro_batch_tokens=60, sharding=Sharding.none, dtype=torch.float16),
    "8 bits": Case(micro_batch_tokens=60, optimizer=Optimizer.adamw_8bit),
}


def batch(images: bool = True) -> list[TrainingSample]:
    """Two groups; two turns in some; one sample twice; one without images."""
    shown: Callable[[int, int], Part] = image if images else lambda rows, columns: [rows, columns]
    samples = []
    for group in range(2):
        for i in range(3):
            opening: list[Part] = [SYSTEM, shown(2, 1 + group), [group, 1]]
            last: list[Part] = [[4], shown(1, 1), Sampled([5 + i, 6, END])] if i else []
            samples.append(sample(f"{group}/{i}", *opening, Sampled([2, i, END]), *last, seed=10 * group + i))
    samples.append(replace(samples[1], rollout_id="again"))
    samples.append(sample("text", SYSTEM, Sampled([1, 2])))
    return samples


def demonstrations(images: bool = True) -> list[TrainingSample]:
    shown: Part = image(1, 1) if images else [7]
    return [sample("sft/0", SYSTEM, Sampled([3, END])), sample("sft/1", SYSTEM, shown, Sampled([2, 2, END]))]


def parts(folder: str, name: str) -> tuple[Policy, TrainerConfig]:
    """The policy and the trainer's config of a case."""
    torch.set_num_threads(1)
    case = CASES[name]
    model: Any = load_model(Path(folder), helpers.TINY)
    model.to(case.dtype)
    model.requires_grad_(not case.freeze_language)
    model.base_model.visual.requires_grad_(not case.freeze_vision)
    config = replace(
        CONFIG,
        packing=case.packing,
        micro_batch_tokens=case.micro_batch_tokens,
        sharding=case.sharding,
        optimizer=case.optimizer,
    )
    return Policy(model, position_function("mrope", 2), []), config


def learner(folder: str, name: str, group: Group | None) -> LocalTrainer:
    """That of rank 0, or of a process alone."""

    def own() -> LocalTrainer:
        policy, config = parts(folder, name)
        return LocalTrainer(policy, config, AlgorithmConfig(), temperature=1.0, max_new_tokens=4, group=group)

    return own() if group is None else group.together("make", [(folder, name)] * (group.size - 1), own)[0]


def follower(folder: str, name: str) -> Follower:
    """That of another rank."""
    policy, config = parts(folder, name)
    ranks = torch.distributed.get_world_size()
    return Follower(Learner(policy, config, AlgorithmConfig(), temperature=1.0, max_new_tokens=4, ranks=ranks))


def steps(trainer: LocalTrainer, name: str, number: int = 2) -> dict[str, np.ndarray]:
    """Figures of each step; then the logprobs of every sample, and the weights."""
    images = CASES[name].images
    found: dict[str, np.ndarray] = {}
    for _ in range(number):
        result = trainer.train_step(batch(images), demonstrations(images))
        for key, value in result.metrics.items():
            found[f"{result.version}/{key}"] = np.array(value)
        found[f"{result.version}/entropies"] = np.concatenate([figures.entropies for figures in result.tokens])
    found["logprobs"] = np.concatenate(trainer.logprobs(batch(images)))
    for key, weight in trainer.weights().items():
        found[f"weights/{key}"] = weight.detach().float().numpy()
    return found


def continued(trainer: LocalTrainer, name: str, checkpoints: str) -> dict[str, np.ndarray]:
    """One more step after the checkpoint, and a checkpoint of that."""
    place = Checkpoints(Path(checkpoints), 9)
    restored = place.load_newest(trainer, print)
    if restored is None:
        trainer.train_step(batch(CASES[name].images), demonstrations(CASES[name].images))
        place.save(trainer.version, trainer, {})
        place.finish()
    return steps(trainer, name, 1)


def main(folder: str, out: str, names: list[str]) -> int:
    """`case` learns from the start, `case@checkpoints` goes on from there, or leaves a checkpoint there."""
    with init_from_environment() as group:
        if group is not None and group.rank > 0:
            return follow(group, follower)
        for name in names:
            case, _, checkpoints = name.partition("@")
            trainer = learner(folder, case, group)
            found = continued(trainer, case, checkpoints) if checkpoints else steps(trainer, case)
            np.savez(Path(out) / f"{case}.npz", **found)  # type: ignore[arg-type]
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
