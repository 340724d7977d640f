"""Moving averages of the policy's weights: their values, and that they come back with a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from support import learning
from vlmrl.config.trainer import TrainerConfig
from vlmrl.errors import CheckpointError
from vlmrl.trainer.averages import AVERAGE
from vlmrl.trainer.optimizer import make_optimizer, set_learning_rate
from vlmrl.trainer.trainer import LocalTrainer
from vlmrl.trainer.training_state import load_weights
from vlmrl.types import FloatArray

DECAY = 0.75


def by_hand(weights: list[FloatArray], decay: float, first: int = 0) -> FloatArray:
    """θ̄_t = decay θ̄_{t−1} + (1 − decay) θ_t, which begins as θ of the step `first`, in float64."""
    average = weights[first]
    for weight in weights[first + 1 :]:
        average = decay * average + (1 - decay) * weight
    return average


def test_the_average_of_each_weight() -> None:
    early, late = torch.ones(2, 3, requires_grad=True), torch.ones(4, requires_grad=True)
    optimizer = make_optimizer(TrainerConfig(ema=DECAY, betas=(0.5, 0.5)), {"early": early, "late": late})
    seen: dict[Tensor, list[FloatArray]] = {early: [], late: []}
    for step in range(5):
        for weight in (early, late):
            has_gradient = weight is early or step >= 2  # as a vision tower before the first image
            weight.grad = torch.full_like(weight, 1.0 + step) if has_gradient else None
        set_learning_rate(optimizer, 0.1)
        optimizer.step()
        for weight, values in seen.items():
            values.append(weight.detach().double().numpy().copy())
    for weight, values in ((early, seen[early]), (late, seen[late][2:])):
        found = optimizer.state[weight][AVERAGE].double().numpy()
        np.testing.assert_allclose(found, by_hand(values, DECAY), rtol=1e-6)
        # three mistakes: the shares exchanged, begun a step later, no decay at all
        for mistake in (by_hand(values, 1 - DECAY), by_hand(values, DECAY, first=1), by_hand(values, 1.0)):
            assert np.abs(found - mistake).max() > 1e-3


def averaging(folder: Path, ema: float | None, case: str = "whole") -> LocalTrainer:
    trainer = learning.learner(str(folder), case, None)
    trainer._learner.config = replace(trainer._learner.config, ema=ema)
    return trainer


def step(trainer: LocalTrainer) -> None:
    trainer.train_step(learning.batch(), learning.demonstrations())


def averages(trainer: LocalTrainer) -> dict[str, Tensor]:
    state = trainer._learner._optimizer.state
    return {name: state[weight][AVERAGE] for name, weight in trainer._learner._weights.trainable().items()}


@pytest.mark.parametrize("case", ["whole", "replicated bfloat16"])
def test_a_run_goes_on_with_its_averages(tiny_folder: Path, tmp_path: Path, case: str) -> None:
    trainer, plain, other = (averaging(tiny_folder, ema, case) for ema in (DECAY, None, DECAY))
    for _ in range(2):
        step(trainer)
        step(plain)
    for name, weight in plain.weights().items():
        assert torch.equal(weight, trainer.weights()[name]), "averages change nothing else"
    trainer.save(str(tmp_path)).result()
    other.load(str(tmp_path))
    step(trainer)
    step(other)
    for name, average in averages(trainer).items():
        assert average.dtype is torch.float32
        assert torch.equal(averages(other)[name], average)
        assert not torch.equal(average, trainer._learner._weights.trainable()[name])

    model = averaging(tiny_folder, None)._learner.policy.model
    restored = dict(model.named_parameters())
    (tmp_path / "later").mkdir()
    trainer.save(str(tmp_path / "later")).result()
    load_weights(tmp_path / "later", restored, averaged=True)
    for name, average in averages(trainer).items():
        assert torch.equal(restored[name].detach(), average)
    load_weights(tmp_path / "later", restored)
    for name, weight in trainer._learner._weights.trainable().items():
        assert torch.equal(restored[name].detach(), weight)


def test_averages_begin_and_end_with_their_key(tiny_folder: Path, tmp_path: Path) -> None:
    without, with_averages = tmp_path / "without", tmp_path / "with"
    trainer = averaging(tiny_folder, None)
    step(trainer)
    for folder in (without, with_averages):
        folder.mkdir()
    trainer.save(str(without)).result()
    parameters = dict(averaging(tiny_folder, None)._learner.policy.model.named_parameters())
    with pytest.raises(CheckpointError, match=r"has no averages of weights: its run had no trainer\.ema"):
        load_weights(without, parameters, averaged=True)
    begun = averaging(tiny_folder, DECAY)
    begun.load(str(without))
    step(begun)
    for name, average in averages(begun).items():
        assert torch.equal(average, begun._learner._weights.trainable()[name]), "it begins as the weight"
    begun.save(str(with_averages)).result()
    ended = averaging(tiny_folder, None)
    ended.load(str(with_averages))
    step(ended)
    assert not any(AVERAGE in state for state in ended._learner._optimizer.state.values())
