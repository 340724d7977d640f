"""Learning in float16: small gradients survive, an overflow costs a second try, and a checkpoint stores the factor."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from support import learning
from vlmrl.config.trainer import TrainerConfig
from vlmrl.errors import NonFiniteLossError
from vlmrl.trainer import optimizer
from vlmrl.trainer.optimizer import LOSS_SCALE_GROWTH_STEPS, LossScale, make_optimizer
from vlmrl.trainer.trainer import LocalTrainer


def trainer_in(folder: Path, case: str = "replicated float16") -> LocalTrainer:
    return learning.learner(str(folder), case, None)


def weights_after_a_step(trainer: LocalTrainer) -> dict[str, Tensor]:
    trainer.train_step(learning.batch(images=True))
    return {name: weight.detach().clone() for name, weight in trainer.weights().items()}


def gradients(trainer: LocalTrainer, monkeypatch: pytest.MonkeyPatch, small: float) -> Tensor:
    """One vector with all gradients that the optimizer gets from demonstrations at weight `small`."""
    found: list[Tensor] = []
    learner = trainer._learner
    clip = learner._clip

    def look() -> float:
        norm = clip()
        found.append(torch.cat([t.grad.flatten() for t in learner._weights.trainable().values() if t.grad is not None]))
        found[0] = found[0].clone()
        return norm

    monkeypatch.setattr(learner, "_clip", look)
    samples = learning.demonstrations()
    trainer._config = replace(trainer._config, warmup=replace(trainer._config.warmup, rl_weight=small))
    trainer.train_step(learning.batch(images=True)[:1], samples)
    return found[0]


def test_gradients_that_float16_cannot_hold_are_not_lost(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scaled = gradients(trainer_in(tiny_folder), monkeypatch, small=1e-6)
    exact = gradients(trainer_in(tiny_folder, "replicated"), monkeypatch, small=1e-6)
    monkeypatch.setattr(optimizer, "FIRST_LOSS_SCALE", 1)
    plain = gradients(trainer_in(tiny_folder), monkeypatch, small=1e-6)
    lost = [float((found - exact).norm() / exact.norm()) for found in (scaled, plain)]
    assert lost[0] < 0.02
    assert lost[1] > 2 * lost[0]
    assert int(((plain == 0) & (exact != 0)).sum()) > 10 * int(((scaled == 0) & (exact != 0)).sum())


def test_an_overflow_costs_a_second_try_and_no_batch(tiny_folder: Path) -> None:
    wanted = weights_after_a_step(trainer_in(tiny_folder))
    trainer = trainer_in(tiny_folder)
    trainer._learner._loss_scale.factor = 2**30
    found = weights_after_a_step(trainer)
    assert 1 < trainer._learner._loss_scale.factor < 2**30
    assert trainer.version == 1
    for name, weight in wanted.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=1e-4)


def test_an_overflow_at_every_factor_is_an_error(tiny_folder: Path) -> None:
    trainer = trainer_in(tiny_folder)
    samples = learning.batch(images=True)
    for sample in samples:
        sample.advantages[sample.loss_mask] = 1e30
    with pytest.raises(NonFiniteLossError, match="the weights were not changed"):
        trainer.train_step(samples)
    assert trainer.version == 0


def test_the_factor_grows_again_and_is_in_a_checkpoint(tiny_folder: Path, tmp_path: Path) -> None:
    trainer = trainer_in(tiny_folder)
    trainer._learner._loss_scale.factor = 2**10
    for _ in range(LOSS_SCALE_GROWTH_STEPS - 1):
        trainer._learner._loss_scale.keep()
    trainer.save(str(tmp_path)).result()
    again = trainer_in(tiny_folder)
    again.load(str(tmp_path))
    assert weights_after_a_step(again).keys()
    assert again._learner._loss_scale.factor == 2**11
    other = trainer_in(tiny_folder, "replicated")
    other.load(str(tmp_path))
    assert other._learner._loss_scale.factor == 1


def test_formats_that_have_the_range_are_not_scaled() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        scale = LossScale(dtype)
        for _ in range(2 * LOSS_SCALE_GROWTH_STEPS):
            scale.keep()
        assert (scale.factor, scale.shrink()) == (1, False)


def test_biases_and_scales_do_not_decay() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3))
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    make_optimizer(TrainerConfig(learning_rate=0.1, weight_decay=0.5), list(model.parameters())).step()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.detach(), before[name] * (0.95 if name == "0.weight" else 1.0))


def test_vectors_alone_have_an_optimizer() -> None:
    scale = torch.ones(3, requires_grad=True)
    scale.grad = torch.zeros(3)
    make_optimizer(TrainerConfig(learning_rate=0.1, weight_decay=0.5), [scale]).step()
    assert scale.tolist() == [1.0, 1.0, 1.0]
