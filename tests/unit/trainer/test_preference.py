"""The loss of preference pairs, against the papers on flat arrays, and its step, against samples one by one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid

from support.helpers import plain_logprobs
from support.learning import pairs
from vlmrl.config.algorithm import AlgorithmConfig
from vlmrl.config.dpo import DPOConfig, PreferenceLoss
from vlmrl.config.model import LoraConfig
from vlmrl.config.trainer import Packing, TrainerConfig
from vlmrl.errors import NonFiniteLossError
from vlmrl.models.families.positions import position_function
from vlmrl.models.lora import add_adapters
from vlmrl.models.policy import Policy
from vlmrl.orchestrator import preferences
from vlmrl.orchestrator.preferences import learn_pairs, score_pairs
from vlmrl.trainer.checkpoint import Checkpoints
from vlmrl.trainer.loop_state import LoopState
from vlmrl.trainer.preference import WEIGHTED_LOGPROBS, PairLogprobs, PairLoss, preference_loss
from vlmrl.trainer.reference import FrozenCopy, WithoutAdapters
from vlmrl.trainer.trainer import LocalTrainer
from vlmrl.types import PreferencePair

Make = Callable[[], Any]
LossOf = Callable[[PairLogprobs, DPOConfig], PairLoss]

SIGMOID, IPO = PreferenceLoss.sigmoid, PreferenceLoss.ipo
CONFIGS = {
    "dpo": DPOConfig(beta=0.3),
    "conservative": DPOConfig(beta=0.3, label_smoothing=0.2),
    "ipo": DPOConfig(beta=0.3, loss=IPO),
    "by length": DPOConfig(beta=2.0, length_normalized=True),
    "with sft": DPOConfig(beta=0.3, sft_weight=0.7),
    "all": DPOConfig(beta=0.5, label_smoothing=0.1, length_normalized=True, sft_weight=0.2),
    "ipo by length": DPOConfig(beta=0.5, loss=IPO, length_normalized=True, sft_weight=0.1),
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


# ── the papers ──────────────────────────────────────────────────────────────────────────────────────────────


def random_pairs(seed: int) -> PairLogprobs:
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 9, (2, 5))
    policy, reference = -random.exponential(2.0, (2, 2, 5)) * lengths
    return PairLogprobs(*policy, *reference, *lengths)


def by_the_papers(pairs: PairLogprobs, config: DPOConfig) -> tuple[float, list[float], list[float]]:
    """The loss, and −∂/∂ log π of one token of each answer, in plain floats.

    DPO: arXiv 2305.18290, eq. 7, and the gradient below it: −β σ(r̂(l) − r̂(w)) [∇ log π(w) − ∇ log π(l)]. Conservative
    DPO: eq. 3 of Mitchell (2023). IPO: arXiv 2310.12036, eq. 17. SFT term: arXiv 2404.19733, eq. 1.
    """
    loss, weights_w, weights_l = 0.0, [], []
    count = len(pairs.chosen)

    def logistic(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    for w, ell, ref_w, ref_l, n_w, n_l in zip(
        *(pairs.chosen, pairs.rejected, pairs.reference_chosen, pairs.reference_rejected),
        *(pairs.chosen_tokens, pairs.rejected_tokens),
        strict=True,
    ):
        of_w, of_l = (1 / n_w, 1 / n_l) if config.length_normalized else (1.0, 1.0)
        reward_w, reward_l = config.beta * of_w * (w - ref_w), config.beta * of_l * (ell - ref_l)
        if config.loss is SIGMOID:
            right = -math.log(logistic(reward_w - reward_l))
            wrong = -math.log(logistic(reward_l - reward_w))
            loss += (1 - config.label_smoothing) * right + config.label_smoothing * wrong
            pull = (1 - config.label_smoothing) * config.beta * logistic(reward_l - reward_w)
            pull -= config.label_smoothing * config.beta * logistic(reward_w - reward_l)
        else:
            h = (reward_w - reward_l) / config.beta
            loss += (h - 1 / (2 * config.beta)) ** 2
            pull = -2 * (h - 1 / (2 * config.beta))
        loss += config.sft_weight * -w / n_w
        weights_w.append((pull * of_w + config.sft_weight / n_w) / count)
        weights_l.append(-pull * of_l / count)
    return loss / count, weights_w, weights_l


def assert_papers(loss: LossOf, config: DPOConfig) -> None:
    for seed in range(3):
        pairs = random_pairs(seed)
        wanted, chosen, rejected = by_the_papers(pairs, config)
        found = loss(pairs, config)
        np.testing.assert_allclose(found.loss, wanted, rtol=1e-10)
        np.testing.assert_allclose(found.chosen_weights, chosen, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(found.rejected_weights, rejected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_loss_is_that_of_its_paper(name: str) -> None:
    assert_papers(preference_loss, CONFIGS[name])


def turned(pairs: PairLogprobs) -> PairLogprobs:
    """Better and worse answers exchanged."""
    return PairLogprobs(
        *(pairs.rejected, pairs.chosen, pairs.reference_rejected, pairs.reference_chosen),
        *(pairs.rejected_tokens, pairs.chosen_tokens),
    )


MISTAKES: dict[str, LossOf] = {
    "sign": lambda pairs, config: preference_loss(turned(pairs), config),
    "the reference of the next pair": lambda pairs, config: preference_loss(
        replace(pairs, reference_chosen=np.roll(pairs.reference_chosen, 1)), config
    ),
    "a sum in place of a mean": lambda pairs, config: scaled(preference_loss(pairs, config), len(pairs.chosen)),
    "weights without β": lambda pairs, config: scaled(preference_loss(pairs, config), 1 / config.beta, loss=1.0),
}


def scaled(found: PairLoss, factor: float, loss: float | None = None) -> PairLoss:
    return PairLoss(
        found.loss * (factor if loss is None else loss),
        found.chosen_weights * factor,
        found.rejected_weights * factor,
        found.metrics,
    )


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_mistake_is_found(name: str, mistake: str) -> None:
    with pytest.raises(AssertionError):
        assert_papers(MISTAKES[mistake], CONFIGS[name])


@pytest.mark.parametrize("name", CONFIGS)
def test_the_weights_are_the_slope_of_the_loss(name: str) -> None:
    """A token more likely by δ changes the loss by −δ times its weight."""
    config, pairs, step = CONFIGS[name], random_pairs(7), 1e-6
    found = preference_loss(pairs, config)
    for field, weights in (("chosen", found.chosen_weights), ("rejected", found.rejected_weights)):
        for place, weight in enumerate(weights):
            nudge = step * np.eye(len(weights))[place]
            up, down = (
                preference_loss(replace(pairs, **{field: getattr(pairs, field) + sign * nudge}), config).loss
                for sign in (1, -1)
            )
            assert weight == pytest.approx(-(up - down) / (2 * step), rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("seed", range(3))
def test_it_is_the_loss_of_trl(seed: int) -> None:
    """`DPOTrainer.dpo_loss` of trl: `loss_type` sigmoid with label smoothing; ipo, whose logprobs are means."""
    pairs = random_pairs(seed)

    def trl(beta: float, smoothing: float, loss_type: str) -> torch.Tensor:
        lengths = [pairs.chosen_tokens, pairs.rejected_tokens] * 2
        sums = [pairs.chosen, pairs.rejected, pairs.reference_chosen, pairs.reference_rejected]
        w, ell, ref_w, ref_l = (
            torch.from_numpy(total / length if loss_type == "ipo" else total)
            for total, length in zip(sums, lengths, strict=True)
        )
        logits = (w - ell) - (ref_w - ref_l)
        if loss_type == "ipo":
            return ((logits - 1 / (2 * beta)) ** 2).mean()
        return (-logsigmoid(beta * logits) * (1 - smoothing) - logsigmoid(-beta * logits) * smoothing).mean()

    for beta, smoothing in ((0.1, 0.0), (0.5, 0.3)):
        found = preference_loss(pairs, DPOConfig(beta=beta, label_smoothing=smoothing)).loss
        assert found == pytest.approx(trl(beta, smoothing, "sigmoid").item(), rel=1e-10)
        by_length = DPOConfig(beta=beta, loss=IPO, length_normalized=True)
        assert preference_loss(pairs, by_length).loss == pytest.approx(trl(beta, 0.0, "ipo").item(), rel=1e-10)


def test_a_policy_that_is_its_reference() -> None:
    pairs = random_pairs(0)
    same = replace(pairs, reference_chosen=pairs.chosen, reference_rejected=pairs.rejected)
    for beta in (0.1, 3.0):
        found = preference_loss(same, DPOConfig(beta=beta, label_smoothing=0.2))
        assert found.loss == pytest.approx(math.log(2), rel=1e-15)
        assert preference_loss(same, DPOConfig(beta=beta)).loss == math.log(2)
        assert preference_loss(same, DPOConfig(beta=beta, loss=IPO)).loss == pytest.approx(1 / (4 * beta**2))
        assert (found.metrics["accuracy"], found.metrics["margin"]) == (0.5, 0.0)


def test_the_metrics_are_those_of_the_implicit_rewards() -> None:
    one, two = np.array([-1.0, -2.0]), np.array([-3.0, -4.0])
    tokens = np.array([2, 2])
    found = preference_loss(
        PairLogprobs(one, two, one - 1, two + np.array([1, -5]), tokens, tokens), DPOConfig(beta=0.5)
    )
    assert found.metrics == pytest.approx(
        {
            "accuracy": 0.5,  # of 1 against −1, and of 1 against 5
            "margin": 0.5 * np.mean([2, -4]),
            "chosen_reward": 0.5,
            "rejected_reward": 0.5 * np.mean([-1, 5]),
            "chosen_logprob": -1.5,
            "rejected_logprob": -3.5,
        }
    )


def test_logprobs_far_apart_do_not_overflow() -> None:
    far, near, tokens = np.array([-1e6]), np.zeros(1), np.ones(1, np.int64)
    found = preference_loss(PairLogprobs(far, near, near, near, tokens, tokens), DPOConfig(beta=1.0))
    assert (found.loss, found.chosen_weights[0]) == (1e6, 1.0)


# ── a step ──────────────────────────────────────────────────────────────────────────────────────────────────

CONFIG = TrainerConfig(max_steps=10, learning_rate=1e-2, eps=1e-2, max_grad_norm=1e9, micro_batch_tokens=60)


def policy_of(model: Any) -> Policy:
    return Policy(model, position_function("mrope", 2), [])


def trainer_of(model: Any, reference: Any, packing: Packing = Packing.tree) -> LocalTrainer:
    return LocalTrainer(
        *(policy_of(model), replace(CONFIG, packing=packing), AlgorithmConfig(loss=WEIGHTED_LOGPROBS)),
        temperature=1.0,
        max_new_tokens=4,
        reference=FrozenCopy(policy_of(reference), offload=False),
    )


def other(model: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


def one_by_one(model: Any, reference: Any, config: DPOConfig) -> tuple[float, float]:
    """Loss and gradient norm of the pairs by transformers alone, through autograd on the whole loss."""
    losses = []
    for pair in pairs():
        chosen, rejected = (torch.cat([plain_logprobs(model, s) for s in answer]) for answer in sides(pair))
        with torch.no_grad():
            ref_w, ref_l = (sum(plain_logprobs(reference, s).sum() for s in answer) for answer in sides(pair))
        margin = config.beta * ((chosen.sum() - ref_w) - (rejected.sum() - ref_l))
        smoothing = config.label_smoothing
        loss = -(1 - smoothing) * logsigmoid(margin) - smoothing * logsigmoid(-margin)
        losses.append(loss - config.sft_weight * chosen.mean())
    whole = torch.stack(losses).mean()
    gradients = torch.autograd.grad(whole, list(model.parameters()), allow_unused=True)
    return whole.item(), math.sqrt(sum(float((g.double() ** 2).sum()) for g in gradients if g is not None))


def sides(pair: PreferencePair) -> tuple[Any, Any]:
    return pair.chosen, pair.rejected


def test_a_step_is_the_same_under_every_packing_and_one_by_one(tiny_model: Make) -> None:
    """Prompts with images that both answers share, and an answer of two branches."""
    config = DPOConfig(beta=0.3, label_smoothing=0.1, sft_weight=0.2)
    wanted_loss, wanted_norm = one_by_one(tiny_model(), other(tiny_model()), config)
    moved, rows = [], []
    for packing in Packing:
        model = tiny_model()
        metrics = learn_pairs(trainer_of(model, other(tiny_model()), packing), pairs(), config)
        assert metrics["loss"] == pytest.approx(wanted_loss, rel=1e-5)
        assert metrics["grad_norm"] == pytest.approx(wanted_norm, rel=1e-5)
        moved.append(dict(model.named_parameters()))
        rows.append(metrics["tokens/packed"])
    for name, weight in moved[0].items():
        for each in moved[1:]:
            torch.testing.assert_close(weight, each[name], rtol=0, atol=1e-5)
    assert rows[0] < 0.8 * rows[1], "the tree computes a shared prompt once"


def test_steps_raise_the_better_answers(tiny_model: Make) -> None:
    """And a control with exchanged pairs falls."""
    exchanged = [PreferencePair(pair.pair_id, pair.rejected, pair.chosen) for pair in pairs()[:2]]
    config = DPOConfig()
    for learned, sign in ((pairs()[:2], 1), (exchanged, -1)):
        trainer = trainer_of(tiny_model(), tiny_model())
        before = score_pairs(trainer, pairs()[:2], config)
        assert before["eval/dpo/loss"] == pytest.approx(math.log(2))
        assert before["eval/dpo/accuracy"] == 0.5
        for _ in range(5):
            learn_pairs(trainer, learned, config)
        after = score_pairs(trainer, pairs()[:2], config)
        assert after["eval/dpo/accuracy"] == (1.0 if sign > 0 else 0.0)
        assert sign * after["eval/dpo/margin"] > 0.1
        assert trainer.version == 5


def test_with_adapters_the_reference_is_the_model_without_them(tiny_model: Make) -> None:
    pytest.importorskip("peft")
    torch.manual_seed(0)
    model = tiny_model()
    add_adapters(model, LoraConfig(rank=4))
    policy = policy_of(model)
    trainer = LocalTrainer(
        *(policy, CONFIG, AlgorithmConfig(loss=WEIGHTED_LOGPROBS)),
        temperature=1.0,
        max_new_tokens=4,
        reference=WithoutAdapters(policy),
    )
    first = learn_pairs(trainer, pairs(), DPOConfig())
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-6)
    second = learn_pairs(trainer, pairs(), DPOConfig())
    assert second["dpo/margin"] > 0
    assert second["loss"] < first["loss"]


def test_a_checkpoint_continues_bit_for_bit(tiny_model: Make, tmp_path: Path) -> None:
    def new() -> LocalTrainer:
        return LocalTrainer(
            *(policy_of(tiny_model()), CONFIG, AlgorithmConfig(loss=WEIGHTED_LOGPROBS)),
            temperature=1.0,
            max_new_tokens=4,
            reference=FrozenCopy(policy_of(other(tiny_model())), offload=False, begins=True),
        )

    never_stopped, stopped = new(), new()
    wanted = [learn_pairs(never_stopped, pairs(), DPOConfig()) for _ in range(3)][-1]
    learn_pairs(stopped, pairs(), DPOConfig())
    place = Checkpoints(tmp_path, 9)
    place.save(1, stopped, LoopState())
    place.finish()
    again = new()
    assert place.load_newest(again, print) is not None
    learn_pairs(again, pairs(), DPOConfig())
    found = learn_pairs(again, pairs(), DPOConfig())
    assert {k: v for k, v in found.items() if "bytes" not in k} == {k: v for k, v in wanted.items() if "bytes" not in k}
    for name, weight in never_stopped.weights().items():
        assert torch.equal(weight, again.weights()[name]), name


def test_without_pairs_a_step_counts_and_changes_nothing(tiny_model: Make) -> None:
    model = tiny_model()
    trainer = trainer_of(model, tiny_model())
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    assert learn_pairs(trainer, [], DPOConfig())["dpo/pairs"] == 0.0
    assert trainer.version == 1
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    assert score_pairs(trainer, [], DPOConfig()) == {}


def test_a_loss_that_is_not_finite_names_the_answers(tiny_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(tiny_model(), tiny_model())
    monkeypatch.setattr(
        preferences, "preference_loss", lambda pairs, config: scaled(preference_loss(pairs, config), math.nan)
    )
    with pytest.raises(NonFiniteLossError, match=r"advantage that is not finite: 1/0, 1/2, 1/1$"):
        learn_pairs(trainer, pairs(), DPOConfig())
    assert trainer.version == 0
