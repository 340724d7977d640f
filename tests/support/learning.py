"""Two training steps, by one process or by several ranks. test_ranks.py runs this script as each rank.

python learning.py <checkpoint folder> <out folder> <case> …
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist

from support import helpers
from support.helpers import END, Part, Sampled, image, sample, with_supports
from vlmrl.config.algorithm import Advantage, AlgorithmConfig, DistillConfig, Divergence, KLConfig
from vlmrl.config.critic import ValueConfig
from vlmrl.config.dpo import DPOConfig
from vlmrl.config.model import LoraConfig
from vlmrl.config.model import Part as ModelPart
from vlmrl.config.trainer import Optimizer, Packing, PartRatesConfig, SFTConfig, Sharding, TrainerConfig
from vlmrl.models.blocks import blocks, prepare_blocks
from vlmrl.models.checkpoints.load import load_model
from vlmrl.models.families.positions import position_function
from vlmrl.models.lora import add_adapters
from vlmrl.models.policy import Policy
from vlmrl.orchestrator.preferences import learn_pairs
from vlmrl.ranks.commands import Command
from vlmrl.ranks.rank_group import RankGroup, follow, init_from_environment
from vlmrl.trainer.checkpoint import Checkpoints
from vlmrl.trainer.commands import Follower
from vlmrl.trainer.learner import Learner
from vlmrl.trainer.loop_state import LoopState
from vlmrl.trainer.preference import WEIGHTED_LOGPROBS
from vlmrl.trainer.reference import FrozenCopy
from vlmrl.trainer.trainer import LocalTrainer
from vlmrl.types import PreferencePair, StepResult, TrainingSample

CONFIG = TrainerConfig(
    max_steps=10,
    learning_rate=1e-2,
    # AdamW's first step is close to the sign of the gradient; with a large eps it varies smoothly with the gradient.
    eps=1e-2,
    weight_decay=0.1,
    max_grad_norm=0.5,
    warmup=SFTConfig(rl_weight=0.3),
)
PAIR_LOSS = DPOConfig(beta=0.3, label_smoothing=0.1, sft_weight=0.2)
COLLECTIVES = "collectives"
EVERYWHERE = (ModelPart.vision_tower, ModelPart.projector, ModelPart.language_model)
SYSTEM = list(range(100, 120))


@dataclass(frozen=True)
class Case:
    """One way to compute the same two steps."""

    packing: Packing = Packing.tree
    micro_batch_tokens: int = 16384
    sharding: Sharding = Sharding.full
    freeze_vision: bool = False
    freeze_language: bool = False
    images: bool = True
    """Whether samples of the batch have images."""
    own_temperatures: bool = False
    """Whether turns were sampled at temperatures of their own, and tokens from supports of their own."""
    shown: bool = True
    """Whether a demonstration has an image, where `images` is set."""
    text_first: bool = False
    """Whether the batch before a checkpoint (`continued`) has no image, so that the vision tower had no gradient."""
    referred: bool = False
    """Whether a moving average of the policy is the reference, and the loss has the distance to it."""
    top_k: int = 0
    """Tokens that the reference reports; above 0 the loss also has the divergence from it."""
    paired: bool = False
    """Whether the steps learn from preference pairs (mode=dpo), against the policy before the first step."""
    recomputed: bool = False
    epochs: int = 1
    """Passes over a batch, each in so many minibatches."""
    target_kl: float | None = None
    critic: bool = False
    """Whether advantages come from a value head, which learns too."""
    lora: bool = False
    adapted: tuple[ModelPart, ...] = (ModelPart.language_model,)
    """The parts that get adapters, with `lora`."""
    rates: PartRatesConfig = field(default_factory=PartRatesConfig)
    ema: float | None = None
    dtype: torch.dtype = torch.float32
    optimizer: Optimizer = Optimizer.adamw


CASES = {
    "whole": Case(),
    "small": Case(micro_batch_tokens=60),
    "one by one": Case(packing=Packing.none),
    "side by side": Case(packing=Packing.varlen, micro_batch_tokens=100),
    "frozen": Case(micro_batch_tokens=60, freeze_vision=True),
    "tower alone": Case(packing=Packing.none, freeze_language=True),
    "tower alone, last pass of text": Case(packing=Packing.none, freeze_language=True, shown=False),
    "own temperatures": Case(micro_batch_tokens=60, own_temperatures=True),
    "own temperatures, replicated": Case(micro_batch_tokens=60, own_temperatures=True, sharding=Sharding.none),
    "referred": Case(micro_batch_tokens=60, referred=True, ema=0.5),
    "referred, replicated": Case(micro_batch_tokens=60, referred=True, sharding=Sharding.none),
    "referred, kept whole": Case(micro_batch_tokens=60, referred=True, ema=0.5, sharding=Sharding.optimizer),
    "referred, one by one": Case(packing=Packing.none, referred=True),
    "epochs": Case(micro_batch_tokens=60, epochs=2),
    "epochs, ended early, kept whole": Case(epochs=2, target_kl=3.0, sharding=Sharding.optimizer),
    "distilled": Case(micro_batch_tokens=60, referred=True, top_k=5, own_temperatures=True),
    "distilled, kept whole": Case(micro_batch_tokens=60, referred=True, top_k=5, sharding=Sharding.optimizer),
    "pairs": Case(micro_batch_tokens=60, paired=True),
    "pairs, replicated": Case(micro_batch_tokens=60, paired=True, sharding=Sharding.none),
    "critic": Case(micro_batch_tokens=60, critic=True, epochs=2, ema=0.5),
    "critic, replicated": Case(micro_batch_tokens=60, critic=True, epochs=2, sharding=Sharding.none),
    "critic, kept whole": Case(micro_batch_tokens=60, critic=True, sharding=Sharding.optimizer),
    "critic, tower alone": Case(packing=Packing.none, critic=True, freeze_language=True),
    "text": Case(micro_batch_tokens=60, images=False),
    "replicated": Case(micro_batch_tokens=60, sharding=Sharding.none),
    "replicated one by one": Case(packing=Packing.none, sharding=Sharding.none),
    "kept whole": Case(micro_batch_tokens=60, sharding=Sharding.optimizer),
    "kept whole one by one": Case(packing=Packing.none, sharding=Sharding.optimizer),
    "kept whole, one pass": Case(sharding=Sharding.optimizer),
    "kept whole, frozen": Case(micro_batch_tokens=60, freeze_vision=True, sharding=Sharding.optimizer),
    "kept whole, recomputed": Case(micro_batch_tokens=60, recomputed=True, sharding=Sharding.optimizer),
    "kept whole, last pass of text": Case(micro_batch_tokens=60, shown=False, sharding=Sharding.optimizer),
    "kept whole, tower alone": Case(packing=Packing.none, freeze_language=True, sharding=Sharding.optimizer),
    "kept whole, tower alone, last pass of text": Case(
        packing=Packing.none, freeze_language=True, shown=False, sharding=Sharding.optimizer
    ),
    "kept whole, adapters": Case(micro_batch_tokens=60, lora=True, sharding=Sharding.optimizer),
    "adapters everywhere": Case(micro_batch_tokens=60, lora=True, adapted=EVERYWHERE),
    "adapters everywhere, one by one": Case(packing=Packing.none, lora=True, adapted=EVERYWHERE),
    "own rates": Case(micro_batch_tokens=60, rates=PartRatesConfig(vision_tower=0.1, projector=3, language_model=0.5)),
    "kept whole in bfloat16": Case(micro_batch_tokens=60, sharding=Sharding.optimizer, dtype=torch.bfloat16),
    "kept whole in float16": Case(micro_batch_tokens=60, sharding=Sharding.optimizer, dtype=torch.float16),
    "bfloat16": Case(micro_batch_tokens=60, dtype=torch.bfloat16),
    "replicated bfloat16": Case(micro_batch_tokens=60, sharding=Sharding.none, dtype=torch.bfloat16),
    "float16": Case(micro_batch_tokens=60, dtype=torch.float16),
    "replicated float16": Case(micro_batch_tokens=60, sharding=Sharding.none, dtype=torch.float16),
    "8 bits": Case(micro_batch_tokens=60, optimizer=Optimizer.adamw_8bit),
    "text first": Case(micro_batch_tokens=60, text_first=True),
    "text first, replicated": Case(micro_batch_tokens=60, text_first=True, sharding=Sharding.none),
    "text first, kept whole": Case(micro_batch_tokens=60, text_first=True, sharding=Sharding.optimizer),
    "text first, in bfloat16": Case(
        micro_batch_tokens=60, text_first=True, sharding=Sharding.none, dtype=torch.bfloat16
    ),
    "text first, adapters": Case(micro_batch_tokens=60, text_first=True, lora=True),
    "text first, 8 bits": Case(micro_batch_tokens=60, text_first=True, optimizer=Optimizer.adamw_8bit),
}


def batch(images: bool = True, own_temperatures: bool = False) -> list[TrainingSample]:
    """Two groups: some samples have two turns, one occurs twice, one has no images. With `own_temperatures`, tokens
    that siblings share were sampled at several temperatures and from several supports, and the last two samples as the
    run samples."""
    shown: Callable[[int, int], Part] = image if images else lambda rows, columns: [rows, columns]
    samples = []
    for group in range(2):
        for i in range(3):
            opening: list[Part] = [SYSTEM, shown(2, 1 + group), [group, 1]]
            last: list[Part] = [[4], shown(1, 1), Sampled([5 + i, 6, END])] if i else []
            samples.append(sample(f"{group}/{i}", *opening, Sampled([2, i, END]), *last, seed=10 * group + i))
    samples.append(replace(samples[1], rollout_id="again"))
    samples.append(sample("text", SYSTEM, Sampled([1, 2])))
    if own_temperatures:
        given = (0.5, 2.0, np.nan, 0.5, 1.5, 1.5, 0.8)
        for i, temperature in enumerate(given):
            of_tokens = np.where(samples[i].loss_mask, temperature, np.nan).astype(np.float32)
            samples[i] = replace(with_supports(samples[i], i), temperatures=of_tokens)
        samples.append(replace(samples[0], rollout_id="at the run's", temperatures=None, supports=None))
    return samples


def pairs() -> list[PreferencePair]:
    """Three pairs. Two share their prompt and its images; the better answer of one is a rollout of two branches."""
    samples = batch()
    return [
        PreferencePair("0", (samples[0],), (samples[1],)),
        PreferencePair("1", (samples[3], samples[5]), (samples[4],)),
        PreferencePair("2", (samples[2],), (samples[0],)),
    ]


def demonstrations(shown: bool = True) -> list[TrainingSample]:
    """Two demonstrations; the second has an image."""
    part: Part = image(1, 1) if shown else [7]
    return [sample("sft/0", SYSTEM, Sampled([3, END])), sample("sft/1", SYSTEM, part, Sampled([2, 2, END]))]


def parts(folder: str, name: str) -> tuple[Policy, TrainerConfig]:
    """The policy and the trainer's config of a case."""
    torch.set_num_threads(1)
    case = CASES[name]
    model: Any = load_model(Path(folder), helpers.TINY)
    model.to(case.dtype)
    model.requires_grad_(not case.freeze_language)
    model.base_model.visual.requires_grad_(not case.freeze_vision)
    if case.lora:
        torch.manual_seed(0)
        add_adapters(model, LoraConfig(rank=4, parts=list(case.adapted)))
    prepare_blocks(model, compiled=False, recomputed=case.recomputed)
    config = replace(
        CONFIG,
        packing=case.packing,
        micro_batch_tokens=case.micro_batch_tokens,
        sharding=case.sharding,
        optimizer=case.optimizer,
        part_rates=case.rates,
        ema=case.ema,
    )
    return Policy(model, position_function("mrope", 2), []), config


def algorithm_of(name: str) -> AlgorithmConfig:
    case = CASES[name]
    distill = DistillConfig(top_k=case.top_k, weight=0.5 if case.top_k else 0.0, divergence=Divergence.jensen_shannon)
    if case.paired:
        return AlgorithmConfig(loss=WEIGHTED_LOGPROBS)
    return AlgorithmConfig(
        kl=KLConfig(loss=0.3 if case.referred else 0.0),
        distill=distill,
        epochs=case.epochs,
        minibatches=case.epochs,
        target_kl=case.target_kl,
        advantage=Advantage.gae if case.critic else Advantage.group_normalized,
        value=ValueConfig(coef=0.5),
    )


def reference_of(folder: str, name: str) -> FrozenCopy | None:
    """The reference of a case, which starts from other weights than the policy's and takes those first."""
    if not (CASES[name].referred or CASES[name].paired):
        return None
    model: Any = load_model(Path(folder), helpers.TINY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    decay = 0.5 if CASES[name].referred else None
    return FrozenCopy(Policy(model, position_function("mrope", 2), []), offload=False, begins=True, decay=decay)


def scored(trainer: LocalTrainer, samples: list[TrainingSample]) -> list[TrainingSample]:
    """The samples, with the scores of the trainer's reference."""
    found = []
    for each, scores in zip(samples, trainer.reference_scores(samples), strict=True):
        whole = np.zeros(len(each.token_ids), np.float32)
        whole[each.loss_mask] = scores.logprobs
        found.append(replace(each, reference_logprobs=whole, reference_top=scores.top))
    return found


def judged(trainer: LocalTrainer, samples: list[TrainingSample], target: float | None = None) -> list[TrainingSample]:
    """The samples, with the trainer's own metrics and values before the step, and with returns that differ from the
    values by the advantages, or that are all `target`."""
    found = []
    for each, before in zip(samples, trainer.token_metrics(samples), strict=True):
        assert before.values is not None
        returns = np.zeros(len(each.token_ids), np.float32)
        returns[each.loss_mask] = before.values + each.advantages[each.loss_mask] if target is None else target
        found.append(replace(each, before=before, returns=returns))
    return found


def prepared(trainer: LocalTrainer, samples: list[TrainingSample], name: str) -> list[TrainingSample]:
    """The samples as a step of the case takes them."""
    if CASES[name].referred:
        samples = scored(trainer, samples)
    return judged(trainer, samples) if CASES[name].critic else samples


def learner(folder: str, name: str, rank_group: RankGroup | None) -> LocalTrainer:
    """The trainer of a case: on rank 0 of `rank_group`, or in a run of one process."""

    def own() -> LocalTrainer:
        policy, config = parts(folder, name)
        return LocalTrainer(
            policy,
            config,
            algorithm_of(name),
            temperature=1.0,
            max_new_tokens=4,
            rank_group=rank_group,
            reference=reference_of(folder, name),
        )

    if rank_group is None:
        return own()
    return rank_group.together([BuildLearner(folder, name)] * (rank_group.size - 1), own)[0]


@dataclass(frozen=True)
class BuildLearner(Command[Follower, None]):
    """Build the learner of a case on a rank other than 0."""

    folder: str
    name: str

    def run(self, worker: Follower) -> None:
        worker.build(self._learner)

    def _learner(self) -> Learner:
        policy, config = parts(self.folder, self.name)
        ranks = torch.distributed.get_world_size()
        return Learner(
            policy,
            config,
            algorithm_of(self.name),
            temperature=1.0,
            max_new_tokens=4,
            ranks=ranks,
            reference=reference_of(self.folder, self.name),
        )


def counted(*names: str) -> Any:
    """A context that counts calls of a torch.distributed function. torch versions differ in its name, so the first of
    `names` that exists is counted."""
    name = next(name for name in names if hasattr(dist, name))
    return patch.object(dist, name, wraps=getattr(dist, name))


def steps(trainer: LocalTrainer, name: str, number: int = 2) -> dict[str, np.ndarray]:
    """Metrics of each step, with the number of collectives that gathered weights and reduced gradients; then the
    logprobs of every sample, and the weights."""
    images, own = CASES[name].images, CASES[name].own_temperatures
    demonstrated = demonstrations(images and CASES[name].shown)
    found: dict[str, np.ndarray] = {}
    found["units"] = np.array(1 + len(blocks(trainer._learner.policy.model)))
    trainer.logprobs(batch(images, own))  # must not leave gathered weights or counts behind for the step
    for _ in range(number):
        samples = prepared(trainer, batch(images, own), name)
        with (
            counted("all_gather_single", "all_gather_into_tensor") as gathers,
            counted("reduce_scatter_single", "reduce_scatter_tensor") as reductions,
        ):
            if CASES[name].paired:
                result = StepResult(trainer.version + 1, learn_pairs(trainer, pairs(), PAIR_LOSS))
            else:
                result = trainer.train_step(samples, demonstrated)
        found[f"{result.version}/{COLLECTIVES}"] = np.array([gathers.call_count, reductions.call_count])
        for key, value in result.metrics.items():
            found[f"{result.version}/{key}"] = np.array(value)
        if result.tokens:
            found[f"{result.version}/entropies"] = np.concatenate([tokens.entropies for tokens in result.tokens])
    found["logprobs"] = np.concatenate(trainer.logprobs(batch(images, own)))
    for key, weight in trainer.weights().items():
        found[f"weights/{key}"] = weight.detach().float().numpy()
    return found


def continued(trainer: LocalTrainer, name: str, checkpoints: str) -> dict[str, np.ndarray]:
    """Resume from the checkpoint in `checkpoints`, or write one after a first step; then one more step."""
    place = Checkpoints(Path(checkpoints), 9)
    restored = place.load_newest(trainer, print)
    if restored is None:
        shown = CASES[name].images and not CASES[name].text_first
        if CASES[name].paired:
            learn_pairs(trainer, pairs(), PAIR_LOSS)
        else:
            trainer.train_step(prepared(trainer, batch(shown), name), demonstrations(shown))
        place.save(trainer.version, trainer, LoopState())
        place.finish()
    return steps(trainer, name, 1)


def main(folder: str, out: str, names: list[str]) -> int:
    """`case` starts from the initial model; `case@folder` resumes from the checkpoint in `folder`, or writes one."""
    with init_from_environment() as rank_group:
        if rank_group is not None and rank_group.rank > 0:
            return follow(rank_group, Follower())
        for name in names:
            case, _, checkpoints = name.partition("@")
            trainer = learner(folder, case, rank_group)
            found = continued(trainer, case, checkpoints) if checkpoints else steps(trainer, case)
            np.savez(Path(out) / f"{case}.npz", **found)  # type: ignore[arg-type]
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
