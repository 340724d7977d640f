"""The value head: what it predicts, what it learns, and where it is stored and where not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from support import learning
from support.helpers import BANNED
from support.learning import batch, judged
from vlmrl.config.algorithm import Advantage, AlgorithmConfig, ImportanceCorrection, Loss
from vlmrl.config.critic import ValueConfig
from vlmrl.config.model import LoraConfig
from vlmrl.config.trainer import Packing, TrainerConfig
from vlmrl.errors import CheckpointError
from vlmrl.models.families.positions import position_function
from vlmrl.models.lora import add_adapters, merged
from vlmrl.models.policy import Policy
from vlmrl.trainer import critic as module
from vlmrl.trainer import objective
from vlmrl.trainer.checkpoint import Checkpoints
from vlmrl.trainer.loop_state import LoopState
from vlmrl.trainer.trainer import LocalTrainer
from vlmrl.trainer.training_state import load_weights
from vlmrl.types import TrainingSample

Array = NDArray[np.float64]
Make = Callable[[], Any]
CONFIG = TrainerConfig(max_steps=10, learning_rate=1e-2, eps=1e-2, weight_decay=0.1, max_grad_norm=0.5)
PPO = AlgorithmConfig(loss=Loss.ppo, advantage=Advantage.gae, value=ValueConfig(coef=0.5, clip=0.2))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def trainer_of(model: Any, algorithm: AlgorithmConfig = PPO, config: TrainerConfig = CONFIG) -> LocalTrainer:
    """A trainer whose value head is not zero, so that its gradient reaches the trunk."""
    policy = Policy(model, position_function("mrope", 2), BANNED)
    trainer = LocalTrainer(policy, config, algorithm, temperature=1.0, max_new_tokens=4)
    with torch.no_grad():
        head = model.value_head
        head.weight.copy_(torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(0)) / 8)
        head.bias.fill_(0.1)
    return trainer


def weights(model: Any) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


# ── the loss ────────────────────────────────────────────────────────────────────────────────────────────────


def value_loss_reference(values: Array, old: Array, returns: Array, clip: float | None) -> Array:
    """PPO2's, value by value."""
    found = []
    for v, o, r in zip(values, old, returns, strict=True):
        near = v if clip is None else min(max(v, o - clip), o + clip)
        found.append(max((v - r) ** 2, (near - r) ** 2) / 2)
    return np.array(found)


@pytest.mark.parametrize("clip", [None, 0.2])
def test_the_value_loss_is_that_of_ppo2(clip: float | None) -> None:
    random = np.random.default_rng(0)
    old, returns, noise = random.normal(size=(3, 50))
    values = torch.tensor(old + 0.3 * noise, requires_grad=True)
    found, clipped = module.value_losses(values, torch.tensor(old), torch.tensor(returns), clip)
    at = values.detach().numpy()
    np.testing.assert_allclose(found.detach().numpy(), value_loss_reference(at, old, returns, clip), rtol=1e-12)
    (slope,) = torch.autograd.grad(found.sum(), values)
    h = 1e-6
    wanted = [value_loss_reference(at + step, old, returns, clip) for step in (h, -h)]
    np.testing.assert_allclose(slope.numpy(), (wanted[0] - wanted[1]) / (2 * h), rtol=1e-5, atol=1e-8)
    further = (
        (np.abs(at - old) > 0.2) & ((at - old) * (returns - old) > 0) & (np.abs(at - returns) < np.abs(old - returns))
    )
    assert bool(clipped.any()) is (clip is not None)
    assert clip is None or (slope.numpy()[clipped.numpy()] == 0).all()
    assert clip is None or (clipped.numpy() <= further).all(), "only values that came nearer are held"


RIGHT = module.value_losses

LOSS_MISTAKES: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "the smaller": lambda v, o, r, c: (torch.minimum(*_both(v, o, r, c)), torch.zeros_like(v, dtype=torch.bool)),
    "not halved": lambda v, o, r, c: (2 * RIGHT(v, o, r, c)[0], RIGHT(v, o, r, c)[1]),
    "clipped around the return": lambda v, o, r, c: RIGHT(v, r, o, c),
    "sign": lambda v, o, r, c: (-RIGHT(v, o, r, c)[0], RIGHT(v, o, r, c)[1]),
}


def _both(v: Tensor, o: Tensor, r: Tensor, clip: float | None) -> tuple[Tensor, Tensor]:
    near = v if clip is None else o + (v - o).clamp(-clip, clip)
    return (v - r).square() / 2, (near - r).square() / 2


@pytest.mark.parametrize("mistake", LOSS_MISTAKES)
def test_a_mistake_in_the_value_loss_is_found(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "value_losses", LOSS_MISTAKES[mistake])
    with pytest.raises(AssertionError):
        test_the_value_loss_is_that_of_ppo2(0.2)


# ── the head ────────────────────────────────────────────────────────────────────────────────────────────────


def plain_values(model: Any, sample: TrainingSample) -> Array:
    """The value head on the last hidden states that transformers returns, one sample at a time."""
    heard: list[Tensor] = []
    handle = model.base_model.get_decoder().norm.register_forward_hook(lambda module, given, out: heard.append(out))
    from support.helpers import plain_logits

    with torch.no_grad():
        plain_logits(model, sample.token_ids, sample.mm_token_type_ids, sample.mm_items)
        handle.remove()
        rows = heard[-1][0][np.flatnonzero(sample.loss_mask) - 1]
        return model.value_head(rows)[:, 0].double().numpy()  # type: ignore[no-any-return]


@pytest.mark.parametrize("packing", Packing)
def test_values_are_of_the_state_before_each_token(packing: Packing, tiny_model: Make) -> None:
    model = tiny_model()
    trainer = trainer_of(model, config=replace(CONFIG, packing=packing, micro_batch_tokens=60))
    plain = tiny_model()
    plain.value_head = model.value_head
    found = trainer.token_metrics(batch())
    for sample, mine in zip(batch(), found, strict=True):
        assert mine.values is not None
        np.testing.assert_allclose(mine.values, plain_values(plain, sample), rtol=1e-4, atol=1e-5)
    for mine, logprobs in zip(found, trainer.logprobs(batch()), strict=True):
        np.testing.assert_array_equal(mine.trainer_logprobs, logprobs)


def test_it_begins_at_zero_and_no_one_else_has_it(tiny_model: Make) -> None:
    model = tiny_model()
    policy = Policy(model, position_function("mrope", 2), [])
    trainer = LocalTrainer(policy, CONFIG, PPO, temperature=1.0, max_new_tokens=4)
    for each in trainer.token_metrics(batch()):
        assert each.values is not None
        assert (each.values == 0).all()
    names = dict(tiny_model().named_parameters()).keys()
    assert trainer.weights().keys() == names
    assert dict(merged(model)).keys() == names, "what the embedded engine has"
    assert model.value_head.weight.dtype is torch.float32


@pytest.mark.parametrize("packing", [Packing.varlen, Packing.none])
@pytest.mark.parametrize("correction", [ImportanceCorrection.own, ImportanceCorrection.masked])
def test_a_step_is_the_same_under_every_packing(
    packing: Packing, correction: ImportanceCorrection, tiny_model: Make
) -> None:
    found = []
    algorithm = replace(PPO, importance_correction=correction)
    for each in (Packing.tree, packing):
        model = tiny_model()
        trainer = trainer_of(model, algorithm, replace(CONFIG, packing=each, micro_batch_tokens=60))
        result = trainer.train_step(judged(trainer, batch()))
        found.append((weights(model), result.metrics))
    for name, wanted in found[1][0].items():
        assert float((found[0][0][name] - wanted).abs().max()) <= 1e-5, name
    for key in ("loss", "grad_norm", "value/loss", "value/explained_variance", "value/clip_fraction"):
        assert found[0][1][key] == pytest.approx(found[1][1][key], rel=1e-5), key
    before = weights(tiny_model())
    assert float((found[0][0]["value_head.weight"]).abs().max()) > 0
    assert float((found[0][0]["value_head.bias"] - 0.1).abs()) > 1e-3
    alone = tiny_model()
    without = trainer_of(alone, replace(algorithm, value=ValueConfig(coef=1e-12)))
    without.train_step(judged(without, batch()))
    trunk = [name for name in before if "layers.0.mlp" in name]
    moved = max(float((found[0][0][n] - weights(alone)[n]).abs().max()) for n in trunk)
    assert moved > 1e-4, "the trunk learns too"


def test_the_metrics_of_the_values(tiny_model: Make) -> None:
    trainer = trainer_of(tiny_model())
    samples = judged(trainer, batch())
    values = np.concatenate([s.before.values for s in samples if s.before is not None and s.before.values is not None])
    returns = np.concatenate([s.returns[s.loss_mask] for s in samples if s.returns is not None])
    values, returns = values.astype(np.float64), returns.astype(np.float64)
    metrics = trainer.train_step(samples).metrics
    residual = returns - values
    explained = 1 - np.mean((residual - residual.mean()) ** 2) / np.mean((returns - returns.mean()) ** 2)
    assert metrics["value/explained_variance"] == pytest.approx(explained, rel=1e-5)
    assert metrics["value/mean"] == pytest.approx(values.mean(), rel=1e-5)
    assert metrics["value/return_mean"] == pytest.approx(returns.mean(), rel=1e-5)
    assert metrics["value/loss"] == pytest.approx(np.mean(residual**2) / 2, rel=1e-4)
    exact = [replace(s, returns=np.where(s.loss_mask, 2.0, 0.0).astype(np.float32)) for s in samples]
    assert np.isnan(module.value_metrics(exact)["value/explained_variance"])
    assert module.value_metrics(batch()) == module.value_metrics([]) == {}
    learned = [trainer.train_step(judged(trainer, batch(), target=0.7)).metrics["value/loss"] for _ in range(8)]
    assert learned[-1] < learned[0] / 2


def test_one_scoring_pass_has_values_and_old_logprobs(tiny_model: Make) -> None:
    """With several optimizer steps, no further pass records the logprobs of the policy before the batch."""
    trainer = trainer_of(tiny_model(), replace(PPO, epochs=2, minibatches=2))
    samples = judged(trainer, batch())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "token_metrics", None)
        result = trainer.train_step(samples)
    assert result.metrics["optimizer_steps"] == 4
    assert result.metrics["last_epoch/value/loss"] != result.metrics["value/loss"]


def test_it_learns_beside_adapters(tiny_model: Make) -> None:
    pytest.importorskip("peft")
    model = tiny_model()
    add_adapters(model, LoraConfig(rank=4))
    trainer = trainer_of(model)
    before = weights(model)
    trainer.train_step(judged(trainer, batch()))
    moved = {name for name, weight in weights(model).items() if not torch.equal(weight, before[name])}
    assert {"value_head.weight", "value_head.bias"} < moved
    assert all("lora" in name or "value_head" in name for name in moved)
    assert not any("value_head" in name for name in trainer.weights())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_is_kept_in_float32(dtype: torch.dtype, tiny_model: Make) -> None:
    model = tiny_model().to(dtype)
    trainer = trainer_of(model)
    metrics = trainer.train_step(judged(trainer, batch())).metrics
    assert np.isfinite(metrics["value/loss"])
    assert model.value_head.weight.dtype is torch.float32
    assert {p.dtype for name, p in model.named_parameters() if "value_head" not in name} == {dtype}


# ── checkpoints ─────────────────────────────────────────────────────────────────────────────────────────────


def test_a_run_that_stopped_goes_on_bit_for_bit(tiny_folder: Path, tmp_path: Path) -> None:
    never_stopped, again = (
        learning.continued(learning.learner(str(tiny_folder), "critic", None), "critic", str(tmp_path))
        for _ in range(2)
    )
    assert never_stopped["2/value/explained_variance"] != 0
    for key, value in never_stopped.items():
        if "memory/" not in key:
            np.testing.assert_array_equal(again[key], value, err_msg=key)


def test_a_checkpoint_has_it_and_an_export_does_not_ask_for_it(tiny_model: Make, tmp_path: Path) -> None:
    model, place = tiny_model(), Checkpoints(tmp_path, 2)
    trainer = trainer_of(model)
    trainer.train_step(judged(trainer, batch()))
    place.save(1, trainer, LoopState())
    place.finish()
    other = tiny_model()
    load_weights(tmp_path / "step_000001", dict(other.named_parameters()))
    for name, weight in other.named_parameters():
        assert torch.equal(weight, model.get_parameter(name)), name
    again = trainer_of(tiny_model())
    assert place.load_newest(again, print) is not None
    policy = again._learner.policy
    assert torch.equal(policy.model.value_head.weight, model.value_head.weight)
    plain = LocalTrainer(
        Policy(tiny_model(), position_function("mrope", 2), []),
        CONFIG,
        AlgorithmConfig(),
        temperature=1.0,
        max_new_tokens=4,
    )
    with pytest.raises(CheckpointError, match="has a value head and this run has none"):
        plain.load(str(tmp_path / "step_000001"))
    plain.train_step(batch())
    place.save(2, plain, LoopState())
    place.finish()
    with pytest.raises(CheckpointError, match="has no value head and this run has one"):
        again.load(str(tmp_path / "step_000002"))


# ── planted mistakes ────────────────────────────────────────────────────────────────────────────────────────

STEP_MISTAKES: dict[str, Callable[..., Any]] = {
    "returns a token late": lambda v, o, r, c: RIGHT(v, o, torch.roll(r, 1), c),
    "divided by the micro-batch": lambda v, o, r, c: (RIGHT(v, o, r, c)[0] / len(v), RIGHT(v, o, r, c)[1]),
    "no gradient": lambda v, o, r, c: RIGHT(v.detach() + 0 * v, o, r, c),
}


@pytest.mark.parametrize("mistake", STEP_MISTAKES)
def test_a_mistake_in_the_step_is_found(mistake: str, tiny_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objective, "value_losses", STEP_MISTAKES[mistake])

    def all_of_them() -> None:
        test_a_step_is_the_same_under_every_packing(Packing.none, ImportanceCorrection.own, tiny_model)
        test_the_metrics_of_the_values(tiny_model)

    with pytest.raises(AssertionError):
        all_of_them()
