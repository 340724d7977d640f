"""Learning in float16: small gradients survive, an overflow costs a second try, and a checkpoint stores the factor.

Parts of the model learn at rates of their own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from support import learning
from vlmrl.config.model import Part
from vlmrl.config.trainer import Optimizer, PartRatesConfig, TrainerConfig
from vlmrl.errors import ConfigError, NonFiniteLossError
from vlmrl.models.parts import assert_rates_reach, part_of_each
from vlmrl.trainer import optimizer
from vlmrl.trainer.optimizer import (
    LOSS_SCALE_GROWTH_STEPS,
    LossScale,
    make_optimizer,
    set_learning_rate,
)
from vlmrl.trainer.trainer import LocalTrainer
from vlmrl.types import FloatArray


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
    make_optimizer(TrainerConfig(learning_rate=0.1, weight_decay=0.5), dict(model.named_parameters())).step()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.detach(), before[name] * (0.95 if name == "0.weight" else 1.0))


def test_vectors_alone_have_an_optimizer() -> None:
    scale = torch.ones(3, requires_grad=True)
    scale.grad = torch.zeros(3)
    make_optimizer(TrainerConfig(learning_rate=0.1, weight_decay=0.5), {"scale": scale}).step()
    assert scale.tolist() == [1.0, 1.0, 1.0]


# ── learning rates of parts ─────────────────────────────────────────────────────────────────────────────────

RATES = PartRatesConfig(vision_tower=0.1, projector=3.0, language_model=0.5, head=2.0)


def adamw_by_hand(
    weight: FloatArray, gradients: list[FloatArray], rate: float, config: TrainerConfig, decay: float
) -> FloatArray:
    """AdamW of arXiv 1711.05101, algorithm 2, in float64, with a constant schedule."""
    beta1, beta2 = config.betas
    mean, square = np.zeros_like(weight), np.zeros_like(weight)
    for step, gradient in enumerate(gradients, 1):
        mean, square = beta1 * mean + (1 - beta1) * gradient, beta2 * square + (1 - beta2) * gradient**2
        root = np.sqrt(square / (1 - beta2**step))
        weight = weight - rate * (mean / (1 - beta1**step) / (root + config.eps) + decay * weight)
    return weight


def learned(config: TrainerConfig, part_of: dict[str, Part] | None) -> tuple[dict[str, FloatArray], dict[str, Any]]:
    """A matrix and a bias of each part after three steps of the optimizer → their values, and how they came about."""
    random = np.random.default_rng(0)
    parameters, gradients = {}, {}
    for part in Part:
        for name, shape in (("weight", (4, 3)), ("bias", (4,))):
            parameters[f"{part.value}.{name}"] = torch.tensor(random.normal(size=shape), dtype=torch.float32)
    before = {name: weight.double().numpy().copy() for name, weight in parameters.items()}
    for weight in parameters.values():
        weight.requires_grad_()
    optimizer = make_optimizer(config, parameters, part_of)
    for name, weight in parameters.items():
        gradients[name] = [random.normal(size=weight.shape) for _ in range(3)]
    for step, rate in enumerate((0.1, 0.1, 0.1)):
        for name, weight in parameters.items():
            weight.grad = torch.tensor(gradients[name][step], dtype=torch.float32)
        set_learning_rate(optimizer, rate)
        optimizer.step()
    found = {name: weight.detach().double().numpy() for name, weight in parameters.items()}
    return found, {"before": before, "gradients": gradients}


PART_OF = {f"{part.value}.{name}": part for part in Part for name in ("weight", "bias")}


def wrong(found: dict[str, FloatArray], known: dict[str, Any], config: TrainerConfig, rates: PartRatesConfig) -> float:
    """The largest difference to AdamW by hand, with each part at its own rate."""
    worst = 0.0
    for name, weight in found.items():
        rate = 0.1 * getattr(rates, name.partition(".")[0])
        decay = config.weight_decay if name.endswith("weight") else 0.0
        wanted = adamw_by_hand(known["before"][name], known["gradients"][name], rate, config, decay)
        worst = max(worst, float(np.abs(weight - wanted).max()))
    return worst


def test_each_part_learns_at_its_own_rate() -> None:
    config = TrainerConfig(learning_rate=7.0, weight_decay=0.3, part_rates=RATES)
    found, known = learned(config, PART_OF)
    assert wrong(found, known, config, RATES) < 1e-6
    # three mistakes: all parts alike, two parts exchanged, the factor twice
    exchanged = replace(RATES, vision_tower=RATES.projector, projector=RATES.vision_tower)
    squared = PartRatesConfig(**{name: factor**2 for name, factor in vars(RATES).items()})
    for mistake in (PartRatesConfig(), exchanged, squared):
        assert wrong(found, known, config, mistake) > 1e-2


def test_equal_rates_change_no_bit() -> None:
    config = TrainerConfig(weight_decay=0.3)
    found, plain = learned(config, PART_OF)[0], learned(config, None)[0]
    for name, weight in plain.items():
        assert np.array_equal(found[name], weight)


def test_in_8_bits_too() -> None:
    pytest.importorskip("torchao")
    config = TrainerConfig(optimizer=Optimizer.adamw_8bit, part_rates=RATES)
    optimizer = make_optimizer(config, {"a": torch.ones(3, requires_grad=True)}, {"a": Part.projector})
    set_learning_rate(optimizer, 0.5)
    assert float(optimizer.param_groups[0]["lr"]) == 1.5


def test_the_parts_of_a_model_learn_at_their_rates(tiny_folder: Path) -> None:
    """A step of AdamW moves weights by the learning rate times the gradient's size, so factors show as ratios."""
    moved = {}
    for name, rates in (("equal", PartRatesConfig()), ("own", replace(RATES, head=1.0))):
        trainer = trainer_in(tiny_folder, "whole")
        trainer._learner.config = replace(trainer._learner.config, part_rates=rates, weight_decay=0.0)
        before = {name: weight.detach().clone() for name, weight in trainer.weights().items()}
        after = weights_after_a_step(trainer)
        moved[name] = {key: after[key].double() - weight.double() for key, weight in before.items()}
    part_of = part_of_each(trainer._learner.policy.model)
    for key, change in moved["equal"].items():
        factor = getattr(rates, part_of[key].value)
        torch.testing.assert_close(moved["own"][key], factor * change, rtol=1e-3, atol=1e-6)


def test_a_factor_without_weights_is_refused(tiny_folder: Path) -> None:
    model = trainer_in(tiny_folder, "frozen")._learner.policy.model
    assert_rates_reach(PartRatesConfig(language_model=0.1), model)
    with pytest.raises(ConfigError, match=r"head=2.0 has no effect.*tied to the embedding belongs to language_model"):
        assert_rates_reach(PartRatesConfig(head=2.0), model)
    with pytest.raises(ConfigError, match=r"vision_tower=0.1 has no effect.*parts that learn: language_model$"):
        assert_rates_reach(PartRatesConfig(vision_tower=0.1), model)
