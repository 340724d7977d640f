"""The trainer: a step equals a reference of a few lines, whatever the packing; its errors; its metrics."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from support.helpers import BANNED, VISION_START, Sampled, plain_logits, plain_logprobs, plain_tokens, sample
from support.learning import batch, demonstrations
from vlmrl.config.algorithm import AlgorithmConfig, Loss
from vlmrl.config.trainer import Decay, Packing, SFTConfig, TrainerConfig
from vlmrl.errors import NonFiniteLossError
from vlmrl.models.families.positions import position_function
from vlmrl.models.policy import Policy
from vlmrl.orchestrator.supervised import loss_of
from vlmrl.trainer.loss import LOSSES, BatchTotals, LossTokens
from vlmrl.trainer.optimizer import learning_rate
from vlmrl.trainer.trainer import EMPTY_STEP, LocalTrainer
from vlmrl.types import ImageItem, TrainingSample

CONFIG = TrainerConfig(
    max_steps=10,
    learning_rate=1e-2,
    # AdamW's first step is close to the sign of the gradient; with a large eps it varies smoothly with the gradient.
    eps=1e-2,
    weight_decay=0.1,
    max_grad_norm=0.5,
)
SYSTEM = list(range(100, 120))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def learner(
    model: Any,
    config: TrainerConfig = CONFIG,
    *,
    algorithm: AlgorithmConfig | None = None,
    temperature: float = 1.0,
    banned: list[int] | None = None,
) -> LocalTrainer:
    policy = Policy(model, position_function("mrope", 2), banned or [])
    return LocalTrainer(policy, config, algorithm or AlgorithmConfig(), temperature=temperature, max_new_tokens=4)


def weights(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_weights(model: Any, wanted: dict[str, Tensor], tolerance: float = 0.0) -> None:
    for name, parameter in model.named_parameters():
        error = float((parameter.detach() - wanted[name]).abs().max())
        assert error <= tolerance, f"{name} is off by {error}"


# ── a step ──────────────────────────────────────────────────────────────────────────────────────────────────


def reference_steps(
    model: Any, batches: list[list[TrainingSample]], rl_weight: float, banned: list[int], entropy_coef: float
) -> list[tuple[float, float]]:
    """AdamW (arXiv 1711.05101, algorithm 2) on the loss of samples one by one → (loss, gradient norm) of each step."""
    c, algorithm, reference = CONFIG, AlgorithmConfig(), []
    parameters = list(model.parameters())
    mean, square = ([torch.zeros_like(p) for p in parameters] for _ in range(2))

    def tokens_of(samples: list[TrainingSample]) -> tuple[Tensor, Tensor]:
        logits = [plain_logits(model, s.token_ids, s.mm_token_type_ids, s.mm_items) for s in samples]
        found = [plain_tokens(each, s, banned) for each, s in zip(logits, samples, strict=True)]
        logprobs, entropies = zip(*found, strict=True)
        return torch.cat(logprobs), torch.cat(entropies)

    for t, samples in enumerate(batches):
        logprobs, entropies = tokens_of(samples)
        tokens = LossTokens(
            logprobs=logprobs,
            inference_logprobs=torch.cat([torch.from_numpy(s.inference_logprobs[s.loss_mask]) for s in samples]),
            advantages=torch.cat([torch.from_numpy(s.advantages[s.loss_mask]) for s in samples]),
            sample_index=torch.cat([torch.full((int(s.loss_mask.sum()),), i) for i, s in enumerate(samples)]),
            entropies=entropies,
        )
        totals = BatchTotals(tokens=len(tokens.logprobs), samples=len(samples), max_new_tokens=4)
        loss = LOSSES[algorithm.loss](tokens, totals, algorithm).loss - entropy_coef * entropies.mean()
        demonstrated = -rl_weight * learning_rate(c, t) / c.learning_rate * tokens_of(demonstrations())[0].mean()
        gradients = torch.autograd.grad(loss + demonstrated, parameters)
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradients))
        lr = learning_rate(c, t)
        with torch.no_grad():
            for p, g, m, v in zip(parameters, gradients, mean, square, strict=True):
                g = g * min(1.0, c.max_grad_norm / norm)
                m.mul_(c.betas[0]).add_(g * (1 - c.betas[0]))
                v.mul_(c.betas[1]).add_(g**2 * (1 - c.betas[1]))
                m_hat, v_hat = m / (1 - c.betas[0] ** (t + 1)), v / (1 - c.betas[1] ** (t + 1))
                decay = c.weight_decay if p.ndim > 1 else 0.0  # not of biases and norms
                p.mul_(1 - lr * decay).sub_(lr * m_hat / (v_hat.sqrt() + c.eps))
        reference.append((float(loss.detach()), norm))
    return reference


@pytest.mark.parametrize(
    ("rl_weight", "banned", "entropy_coef"), [(0.0, [], 0.0), (0.3, BANNED, 0.0), (0.0, BANNED, 0.3)]
)
def test_steps_are_those_of_a_plain_adamw_on_the_same_loss(
    tiny_model: Callable[[], Any], rl_weight: float, banned: list[int], entropy_coef: float
) -> None:
    config = replace(CONFIG, warmup=SFTConfig(rl_weight=rl_weight))
    batches = [batch(), batch()[:4], batch()[2:]]
    plain, model = tiny_model(), tiny_model()
    wanted = reference_steps(plain, batches, rl_weight, banned, entropy_coef)
    trainer = learner(model, config, algorithm=AlgorithmConfig(entropy_coef=entropy_coef), banned=banned)
    assert trainer.version == 0
    for t, (samples, (loss, norm)) in enumerate(zip(batches, wanted, strict=True)):
        result = trainer.train_step(samples, demonstrations() if rl_weight else ())
        assert result.version == trainer.version == t + 1
        assert result.metrics["loss"] == pytest.approx(loss, rel=1e-5, abs=1e-6)
        assert result.metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
        assert result.metrics["learning_rate"] == learning_rate(CONFIG, t)
    assert max(norm for _, norm in wanted) > CONFIG.max_grad_norm, "no gradient is clipped, so clipping is not tested"
    before = tiny_model()
    moved = weights(plain)
    assert max(float((moved[name] - w).abs().max()) for name, w in weights(before).items()) > 1e-3
    assert_weights(model, weights(plain), tolerance=2e-6)


@pytest.mark.parametrize("loss", Loss)
def test_a_step_depends_neither_on_packing_nor_on_the_budget(tiny_model: Callable[[], Any], loss: Loss) -> None:
    outcomes = []
    for packing, budget in ((Packing.none, 1), (Packing.varlen, 80), (Packing.tree, 50), (Packing.tree, 16384)):
        model = tiny_model()
        config = replace(CONFIG, packing=packing, micro_batch_tokens=budget)
        result = learner(model, config, algorithm=AlgorithmConfig(loss=loss, entropy_coef=0.3)).train_step(batch())
        outcomes.append((result.metrics, weights(model), result.tokens))
    reference, wanted, tokens = outcomes[0]
    assert [m["micro_batches"] for m, *_ in outcomes[::3]] == [8, 1]
    assert 1 < outcomes[1][0]["micro_batches"] < 8
    for metrics, found, per_sample in outcomes[1:]:
        for one, other in zip(tokens, per_sample, strict=True):
            np.testing.assert_allclose(one.trainer_logprobs, other.trainer_logprobs, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(one.entropies, other.entropies, rtol=1e-5, atol=1e-6)
        # The peak is that of the whole process so far, so a later run may raise it.
        for key in metrics.keys() - {"tokens/packed", "images/encoded", "micro_batches", "memory/peak_bytes"}:
            assert metrics[key] == pytest.approx(reference[key], rel=1e-5, abs=1e-6), key
        for name in wanted:
            assert float((found[name] - wanted[name]).abs().max()) <= 2e-6, name


def test_the_metrics_of_a_step(tiny_model: Callable[[], Any]) -> None:
    samples, model = batch(), tiny_model()
    trainer = learner(model)
    for _ in range(2):
        trainer.train_step([])
    plain = tiny_model()
    with torch.no_grad():
        logprobs = torch.cat([plain_logprobs(plain, s) for s in samples]).double()
        entropies = []
        for s in samples:
            log_p = torch.log_softmax(plain_logits(plain, s.token_ids, s.mm_token_type_ids, s.mm_items), -1).double()
            entropies.append(-(log_p.exp() * log_p).sum(-1)[np.flatnonzero(s.loss_mask) - 1])
    log_ratio = logprobs - torch.cat([torch.from_numpy(s.inference_logprobs[s.loss_mask]) for s in samples])
    kl = log_ratio.exp() - 1 - log_ratio
    staleness = np.concatenate([2 - s.versions[s.loss_mask] for s in samples])
    result = trainer.train_step(samples)
    metrics = result.metrics
    lengths = [int(s.loss_mask.sum()) for s in samples]
    wanted = zip(torch.split(logprobs, lengths), entropies, strict=True)
    for found, (logprob, entropy) in zip(result.tokens, wanted, strict=True):
        np.testing.assert_allclose(found.trainer_logprobs, logprob, rtol=1e-5)
        np.testing.assert_allclose(found.entropies, entropy, rtol=1e-5)
    assert metrics["entropy"] == pytest.approx(float(torch.cat(entropies).mean()), rel=1e-5)
    assert metrics["mismatch_kl/mean"] == pytest.approx(float(kl.mean()), rel=1e-4)
    assert metrics["mismatch_kl/max"] == pytest.approx(float(kl.max()), rel=1e-4)
    assert metrics["ratio/mean"] == pytest.approx(float(log_ratio.exp().mean()), rel=1e-4)
    assert metrics["staleness/mean"] == pytest.approx(float(staleness.mean()))
    assert metrics["staleness/max"] == staleness.max() == 2
    assert metrics["tokens/trained"] == len(logprobs)
    assert metrics["tokens/unpacked"] == sum(len(s.token_ids) for s in samples)
    assert metrics["tokens/packed"] < metrics["tokens/unpacked"] / 2
    assert metrics["images/encoded"] == len({item.hash for s in samples for item in s.mm_items})


def test_an_empty_batch_is_a_step_that_changes_nothing(tiny_model: Callable[[], Any]) -> None:
    model = tiny_model()
    trainer, before = learner(model), weights(model)
    result = trainer.train_step([])
    assert result.version == trainer.version == 1
    assert result.metrics.pop("memory/peak_bytes") > 10_000_000
    assert result.metrics == dict.fromkeys(EMPTY_STEP, 0.0)
    assert_weights(model, before)


def test_frozen_vision_stays_as_it_is_and_the_rest_learns(tiny_model: Callable[[], Any]) -> None:
    frozen, free = tiny_model(), tiny_model()
    frozen.base_model.visual.requires_grad_(False)
    before = weights(frozen)
    metrics, wanted = learner(frozen).train_step(batch()).metrics, learner(free).train_step(batch()).metrics
    assert metrics["loss"] == pytest.approx(wanted["loss"])
    assert metrics["grad_norm"] < wanted["grad_norm"], "the norm covers only trainable parameters"
    for name, parameter in frozen.named_parameters():
        assert torch.equal(parameter, before[name]) == ("visual" in name), name


# ── what stops it ───────────────────────────────────────────────────────────────────────────────────────────


def with_nan(sample: TrainingSample, field: str) -> TrainingSample:
    values = getattr(sample, field).copy()
    values[np.flatnonzero(sample.loss_mask)[-1]] = np.nan
    return replace(sample, **{field: values})


def with_broken_image(sample: TrainingSample) -> TrainingSample:
    pixels = np.full_like(sample.mm_items[0].mm_kwargs["pixel_values"], np.nan)
    item = sample.images[0]
    broken = ImageItem("broken", item.pixels, {**item.mm_kwargs, "pixel_values": pixels}, item.num_tokens)
    placeholders = (replace(sample.placeholders[0], hash="broken"), *sample.placeholders[1:])
    return replace(sample, mm_items=(broken, *sample.mm_items[1:]), placeholders=placeholders)


BREAK: dict[str, Callable[[TrainingSample], TrainingSample]] = {
    "advantage": lambda s: with_nan(s, "advantages"),
    "inference_logprob": lambda s: with_nan(s, "inference_logprobs"),
    "pixels": with_broken_image,
}


@pytest.mark.parametrize(
    ("what", "packing"),
    [
        ("advantage", Packing.tree),
        ("advantage", Packing.none),
        ("inference_logprob", Packing.varlen),
        ("pixels", Packing.tree),
    ],
)
def test_a_sample_that_is_not_finite_stops_the_step_by_name_and_nothing_is_changed(
    tiny_model: Callable[[], Any], what: str, packing: Packing
) -> None:
    """The optimizer is unchanged too: the next step equals the one of a trainer that never saw the broken batch."""
    config = replace(CONFIG, packing=packing, micro_batch_tokens=60)
    model, other = tiny_model(), tiny_model()
    trainer, undisturbed = learner(model, config), learner(other, config)
    good, broken = batch(), batch()
    broken[3] = BREAK[what](broken[3])
    for each in (trainer, undisturbed):
        each.train_step(good)
    before = weights(model)
    with pytest.raises(NonFiniteLossError, match=r"loss is nan at version 1, so the weights were not .*: 1/0$"):
        trainer.train_step(broken)
    assert trainer.version == 1
    assert_weights(model, before)
    assert all(p.grad is None for p in model.parameters())
    after, wanted = trainer.train_step(good), undisturbed.train_step(good)
    assert {**after.metrics, "memory/peak_bytes": 0} == {**wanted.metrics, "memory/peak_bytes": 0}
    assert_weights(model, weights(other))


def test_a_poisoned_weight_stops_the_step(tiny_model: Callable[[], Any]) -> None:
    model = tiny_model()
    trainer = learner(model)
    with torch.no_grad():
        model.get_input_embeddings().weight[7, 3] = torch.nan
    with pytest.raises(NonFiniteLossError, match=r"loss is nan at version 0.*: 0/0, 0/1, .*, text$"):
        trainer.train_step(batch())
    assert trainer.version == 0
    assert float(model.get_input_embeddings().weight.isnan().sum()) == 1
    with pytest.raises(NonFiniteLossError):
        trainer.supervised_step(batch(), 1e-3)
    assert trainer.supervised_steps == 0


def test_a_gradient_that_is_not_finite_stops_the_step(tiny_model: Callable[[], Any]) -> None:
    """The loss is finite; only the gradient of one layer is not."""
    model = tiny_model()
    trainer, before = learner(model), weights(model)
    handle = model.base_model.language_model.norm.weight.register_hook(lambda g: g * torch.inf)
    with pytest.raises(NonFiniteLossError, match=r"gradient norm is (inf|nan) at version 0, so .*0/0, 0/1, 0/2"):
        trainer.train_step(batch())
    handle.remove()
    assert_weights(model, before)
    assert all(p.grad is None for p in model.parameters())


# ── schedule, distribution, supervision ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("decay", "wanted"),
    [
        (Decay.constant, [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        (Decay.linear, [0.25, 0.5, 0.75, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2]),
        (Decay.cosine, [0.25, 0.5, 0.75, 1.0, 1.0, 0.8828, 0.6, 0.3172, 0.2]),
        (Decay.wsd, [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 0.4343, 0.2]),
    ],
)
def test_the_learning_rate_rises_then_decays_to_its_floor(decay: Decay, wanted: list[float]) -> None:
    config = TrainerConfig(
        max_steps=8, learning_rate=2.0, lr_warmup_steps=4, decay=decay, min_lr_ratio=0.2, decay_share=0.5
    )
    assert [round(learning_rate(config, step) / 2, 4) for step in range(9)] == wanted
    assert learning_rate(config, 100) == learning_rate(config, 8)


def wsd_of_the_paper(n: int, steps: int, warmup: int, decaying: int) -> float:
    """arXiv 2405.18392, eq. 1, with f = 1 − sqrt; `n` counts the steps from 0, where it gives the share of the peak."""
    if n < warmup:
        return (n + 1) / warmup  # a first step at rate 0 would be lost
    return 1.0 if n < steps - decaying else float(1 - np.sqrt((n - (steps - decaying)) / decaying))


def test_warm_up_stable_decay_is_the_papers() -> None:
    config = TrainerConfig(
        max_steps=50, learning_rate=1.0, lr_warmup_steps=10, decay=Decay.wsd, min_lr_ratio=0.0, decay_share=0.25
    )
    wanted = [wsd_of_the_paper(step, 50, 10, 10) for step in range(51)]
    np.testing.assert_allclose([learning_rate(config, step) for step in range(51)], wanted, atol=1e-7)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_logprobs_are_of_the_distribution_that_was_sampled_from(
    tiny_model: Callable[[], Any], temperature: float
) -> None:
    """Banned tokens have probability 0, and sampling one does not affect the logprobs of other tokens."""
    samples, model = batch(), tiny_model()
    stray = sample("stray", SYSTEM, Sampled([1, VISION_START, 2]))
    found = learner(model, temperature=temperature, banned=BANNED).logprobs([*samples, stray])
    plain = tiny_model()
    for s, mine in zip([*samples, stray], found, strict=True):
        with torch.no_grad():
            logits = plain_logits(plain, s.token_ids, s.mm_token_type_ids, s.mm_items) if s is not stray else None
        if logits is None:
            assert mine[1] == -np.inf
            assert np.isfinite(mine[[0, 2]]).all()
            continue
        logits[:, BANNED] = -torch.inf
        where = np.flatnonzero(s.loss_mask)
        wanted = torch.log_softmax(logits / temperature, -1)[where - 1, s.token_ids[where]]
        np.testing.assert_allclose(mine, wanted.numpy(), rtol=1e-5, atol=1e-5)


def own_divisors(s: TrainingSample, run: float) -> np.ndarray:
    """float64 [loss tokens, 1]; the temperature of each loss token."""
    own = np.full(len(s.token_ids), np.nan) if s.temperatures is None else s.temperatures.astype(np.float64)
    return np.where(np.isnan(own), run, own)[s.loss_mask, None]


@pytest.mark.parametrize("packing", [Packing.tree, Packing.varlen, Packing.none])
def test_each_token_has_the_temperature_that_it_was_sampled_at(tiny_model: Callable[[], Any], packing: Packing) -> None:
    """Siblings that share the row before their first token, and equal samples at several temperatures, against
    log_softmax of the samples one by one; and the same without their temperatures, which is caught. (test_exactness.py
    has the truncated distributions.)"""
    samples, model = [replace(s, supports=None) for s in batch(own_temperatures=True)], tiny_model()
    trainer = learner(model, replace(CONFIG, packing=packing), temperature=0.7, banned=BANNED)
    wanted, entropies = [], []
    for s in samples:
        with torch.no_grad():
            logits = plain_logits(tiny_model(), s.token_ids, s.mm_token_type_ids, s.mm_items)
        where = np.flatnonzero(s.loss_mask)
        logits[:, BANNED] = -torch.inf
        log_p = torch.log_softmax(logits[where - 1] / torch.from_numpy(own_divisors(s, 0.7)), -1)
        wanted.append(log_p[np.arange(len(where)), s.token_ids[where]].numpy())
        entropies.append(-(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0)).sum(-1).numpy())
    for mine, theirs in zip(trainer.logprobs(samples), wanted, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)
    step = trainer.train_step(samples)
    for tokens, theirs, other in zip(step.tokens, wanted, entropies, strict=True):
        np.testing.assert_allclose(tokens.trainer_logprobs, theirs, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(tokens.entropies, other, rtol=1e-5, atol=1e-5)
    lost = learner(tiny_model(), replace(CONFIG, packing=packing), temperature=0.7, banned=BANNED)
    without = lost.logprobs([replace(s, temperatures=None) for s in samples])
    assert max(np.abs(a - b).max() for a, b in zip(without, wanted, strict=True)) > 0.05


def test_the_gradient_of_mixed_temperatures_is_that_of_the_samples_one_by_one(tiny_model: Callable[[], Any]) -> None:
    shared, alone = tiny_model(), tiny_model()
    for model, packing in ((shared, Packing.tree), (alone, Packing.none)):
        learner(model, replace(CONFIG, packing=packing)).train_step(batch(own_temperatures=True))
    assert_weights(shared, weights(alone), tolerance=1e-6)
    lost = tiny_model()
    learner(lost).train_step([replace(s, temperatures=None) for s in batch(own_temperatures=True)])
    with pytest.raises(AssertionError, match="is off by"):
        assert_weights(lost, weights(alone), tolerance=1e-6)


def test_the_runs_own_temperature_gives_the_same_bits_however_it_is_stated(tiny_model: Callable[[], Any]) -> None:
    """Tokens without a temperature of their own, and a batch in which no sample has any."""
    samples = batch()
    stated = [replace(s, temperatures=np.full(len(s.token_ids), np.nan, np.float32)) for s in samples]
    found = [learner(tiny_model(), temperature=0.5).logprobs(each) for each in (samples, stated)]
    for plain, marked in zip(*found, strict=True):
        np.testing.assert_array_equal(plain, marked)


def test_supervised_steps_lower_the_loss_and_are_no_policy_versions(tiny_model: Callable[[], Any]) -> None:
    samples, model = batch(), tiny_model()
    with torch.no_grad():
        wanted = -torch.cat([plain_logprobs(model, s) for s in samples]).mean()
    config = replace(CONFIG, eps=1e-8, weight_decay=0.0, micro_batch_tokens=60)
    trainer = learner(model, config)
    assert loss_of(trainer, samples) == pytest.approx(float(wanted), rel=1e-5), "measured, and nothing learned"
    metrics = [trainer.supervised_step(samples, 3e-3) for _ in range(12)]
    losses = [m["loss"] for m in metrics]
    assert losses[0] == pytest.approx(float(wanted), rel=1e-5)
    assert losses[-1] < losses[0] / 2
    assert metrics[0]["learning_rate"] == 3e-3
    assert metrics[0]["grad_norm"] > 0
    assert (trainer.supervised_steps, trainer.version) == (12, 0)
