"""The second model: what it scores, when it takes the policy's weights, and what a checkpoint keeps of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from support.helpers import BANNED, plain_logits, plain_tokens
from support.learning import batch, scored
from vlmrl.config.algorithm import AlgorithmConfig, KLConfig
from vlmrl.config.model import LoraConfig
from vlmrl.config.trainer import Packing, TrainerConfig
from vlmrl.models.families.positions import position_function
from vlmrl.models.lora import add_adapters
from vlmrl.models.policy import Policy
from vlmrl.trainer.loss import LossOutput
from vlmrl.trainer.reference import FrozenCopy, Reference, WithoutAdapters
from vlmrl.trainer.trainer import LocalTrainer
from vlmrl.types import FloatArray

CONFIG = TrainerConfig(max_steps=10, learning_rate=1e-2, eps=1e-2, max_grad_norm=0.5)
Make = Callable[[], Any]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def policy_of(model: Any) -> Policy:
    return Policy(model, position_function("mrope", 2), BANNED)


def trainer_of(
    policy: Policy, reference: Reference, *, packing: Packing = Packing.tree, kl: float = 0.3, temperature: float = 0.7
) -> LocalTrainer:
    algorithm = AlgorithmConfig(kl=KLConfig(loss=kl))
    config = replace(CONFIG, packing=packing, micro_batch_tokens=60)
    return LocalTrainer(policy, config, algorithm, temperature=temperature, max_new_tokens=4, reference=reference)


def logprobs_of(trainer: LocalTrainer) -> list[FloatArray]:
    """The reference's logprobs of the loss tokens of each sample."""
    return [scores.logprobs for scores in trainer.reference_scores(batch())]


def other(model: Any, seed: int = 1) -> Any:
    """A model with other weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


def weights(model: Any) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("packing", Packing)
def test_it_scores_as_transformers_does(packing: Packing, tiny_model: Make) -> None:
    """With the temperature and the banned tokens of sampling, and under every packing."""
    teacher = other(tiny_model())
    trainer = trainer_of(
        policy_of(tiny_model()), FrozenCopy(policy_of(other(tiny_model())), offload=False), packing=packing
    )
    for sample, found in zip(batch(), logprobs_of(trainer), strict=True):
        logits = plain_logits(teacher, sample.token_ids, sample.mm_token_type_ids, sample.mm_items) / 0.7
        wanted = plain_tokens(logits, sample, BANNED)[0].detach().numpy()
        np.testing.assert_allclose(found, wanted, atol=2e-5)


@pytest.mark.parametrize("packing", [Packing.varlen, Packing.none])
def test_the_step_is_the_same_under_every_packing(packing: Packing, tiny_model: Make) -> None:
    moved = []
    for each in (Packing.tree, packing):
        policy = policy_of(tiny_model())
        trainer = trainer_of(policy, FrozenCopy(policy_of(other(tiny_model())), offload=False), packing=each)
        result = trainer.train_step(scored(trainer, batch()))
        moved.append((weights(policy.model), result.metrics["reference_kl/mean"], result.metrics["loss"]))
    (tree, tree_kl, tree_loss), (plain, plain_kl, plain_loss) = moved
    assert tree_kl == pytest.approx(plain_kl, rel=1e-5)
    assert tree_loss == pytest.approx(plain_loss, rel=1e-5)
    for name, weight in tree.items():
        torch.testing.assert_close(weight, plain[name], rtol=0, atol=1e-5)


def test_the_policy_itself_is_at_no_distance_and_pulls_nowhere(tiny_model: Make) -> None:
    """The first step with the distance equals the first step without it, and the metric is 0."""
    found = []
    for kl in (0.0, 10.0):
        policy = policy_of(tiny_model())
        trainer = trainer_of(policy, FrozenCopy(policy_of(other(tiny_model())), offload=False, begins=True), kl=kl)
        result = trainer.train_step(scored(trainer, batch()))
        assert result.metrics["reference_kl/mean"] == 0.0
        found.append(weights(policy.model))
    for name, weight in found[0].items():
        torch.testing.assert_close(weight, found[1][name], rtol=0, atol=1e-7)


def test_the_distance_pulls_towards_the_reference(tiny_model: Make) -> None:
    """Without rewards, steps bring the policy nearer."""
    trainer = trainer_of(policy_of(tiny_model()), FrozenCopy(policy_of(other(tiny_model())), offload=False), kl=1.0)
    kls = []
    for _ in range(8):
        samples = [replace(each, advantages=np.zeros_like(each.advantages)) for each in batch()]
        kls.append(trainer.train_step(scored(trainer, samples)).metrics["reference_kl/mean"])
    assert kls[-1] < 0.8 * kls[0]


def test_it_takes_the_policys_weights_before_the_first_step_and_at_each_refresh(tiny_model: Make) -> None:
    copy = FrozenCopy(policy_of(other(tiny_model())), offload=False, begins=True, refresh_every=2)
    policy = policy_of(tiny_model())
    trainer = trainer_of(policy, copy)
    held = []
    for _ in range(4):
        samples = scored(trainer, batch())
        held.append((weights(copy.policy.model), weights(policy.model)))
        trainer.train_step(samples)
    assert_equal(*held[0])  # as it was before the first step
    assert_equal(held[1][0], held[0][0])
    assert_equal(*held[2])  # after two steps
    assert_equal(held[3][0], held[2][0])
    with pytest.raises(AssertionError):
        assert_equal(*held[3])


def test_it_takes_them_later_where_the_first_step_had_no_samples(tiny_model: Make) -> None:
    copy = FrozenCopy(policy_of(other(tiny_model())), offload=False, begins=True)
    policy = policy_of(tiny_model())
    trainer = trainer_of(policy, copy)
    assert trainer.reference_scores([]) == []
    trainer.train_step([])
    assert trainer.version == 1
    trainer.reference_scores(batch())
    assert_equal(weights(copy.policy.model), weights(policy.model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_moving_average_is_that_of_numpy(dtype: torch.dtype, tiny_model: Make) -> None:
    copy = FrozenCopy(policy_of(other(tiny_model()).to(dtype)), offload=False, begins=True, decay=0.9)
    policy = policy_of(tiny_model())
    trainer = trainer_of(policy, copy)
    samples = scored(trainer, batch())
    wanted = {name: weight.double() for name, weight in weights(policy.model).items()}
    for _ in range(3):
        trainer.train_step(samples)
        wanted = {name: 0.9 * wanted[name] + 0.1 * weight.double() for name, weight in weights(policy.model).items()}
    for name, average in copy.state().items():
        assert average.dtype == torch.float32
        np.testing.assert_allclose(average.detach().double(), wanted[name], rtol=0, atol=1e-6)
        assert torch.equal(weights(copy.policy.model)[name], average.detach().to(dtype))


def test_without_adapters_it_is_the_model_before_the_first_step(tiny_model: Make) -> None:
    pytest.importorskip("peft")
    model = tiny_model()
    torch.manual_seed(0)
    add_adapters(model, LoraConfig(rank=4))
    policy = policy_of(model)
    trainer = trainer_of(policy, WithoutAdapters(policy))
    first = logprobs_of(trainer)
    for _ in range(3):
        result = trainer.train_step(scored(trainer, batch()))
    assert result.metrics["reference_kl/mean"] > 0
    for then, now in zip(first, logprobs_of(trainer), strict=True):
        assert np.array_equal(then, now)
    assert any(not np.array_equal(then, now) for then, now in zip(first, trainer.logprobs(batch()), strict=True)), (
        "the adapters are back"
    )


@pytest.mark.parametrize("settings", [{}, {"decay": 0.5}, {"refresh_every": 2}])
def test_a_checkpoint_continues_as_if_it_had_not_stopped(
    settings: dict[str, Any], tiny_model: Make, tmp_path: Path
) -> None:
    def make() -> tuple[Any, LocalTrainer]:
        policy = policy_of(tiny_model())
        copy = FrozenCopy(policy_of(other(tiny_model())), offload=False, begins=True, **settings)
        return policy.model, trainer_of(policy, copy)

    model, trainer = make()
    for _ in range(3):
        trainer.train_step(scored(trainer, batch()))
    trainer.save(str(tmp_path)).result()
    again, resumed = make()
    resumed.load(str(tmp_path))
    for each in (trainer, resumed):
        each.train_step(scored(each, batch()))
    assert_equal(weights(model), weights(again))
    for then, now in zip(logprobs_of(trainer), logprobs_of(resumed), strict=True):
        assert np.array_equal(then, now)


def test_what_can_be_made_again_is_not_in_the_checkpoint(tiny_model: Make) -> None:
    assert FrozenCopy(policy_of(tiny_model()), offload=False).state() == {}


def test_a_loss_of_ones_own_reads_its_logprobs(tiny_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor | None] = []

    def mine(tokens: Any, totals: Any, config: Any) -> LossOutput:
        seen.append(tokens.reference_logprobs)
        return LossOutput(-(tokens.advantages * tokens.logprobs).sum() / totals.tokens)

    monkeypatch.setattr("vlmrl.trainer.objective.loss_function", lambda name: mine)
    trainer = trainer_of(policy_of(tiny_model()), FrozenCopy(policy_of(other(tiny_model())), offload=False))
    samples = scored(trainer, batch())
    trainer.train_step(samples)
    given = sorted(torch.cat([each for each in seen if each is not None]).tolist())
    assert given == sorted(np.concatenate([each.reference_logprobs[each.loss_mask] for each in samples]).tolist())  # type: ignore[index]


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, weight in found.items():
        assert torch.equal(weight, wanted[name]), name
