"""Every family of the zoo is trained: packing, pixels, resumed runs, adapters, frozen parts, the embedded engine."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from support.families import FAMILIES
from support.families.learning import LEARNING, Folder, Learning, blank, learning
from vlmrl.config.algorithm import AlgorithmConfig
from vlmrl.config.trainer import Packing
from vlmrl.inference.embedded.engine import EmbeddedEngine
from vlmrl.models.policy import Policy
from vlmrl.models.vision_encoder import image_parameters
from vlmrl.trainer.forward import loss_logprobs
from vlmrl.trainer.loss import BatchTotals, LossTokens
from vlmrl.trainer.objective import policy_loss
from vlmrl.trainer.packing import pack
from vlmrl.trainer.trainer import LocalTrainer
from vlmrl.types import Completion, Prompt, SamplingParams, TrainingSample, mm_token_type_ids

WITH_IMAGES = [name for name in LEARNING if FAMILIES[name].image_token is not None]

TOLERANCE = 1e-5
"""Of logprobs: the largest difference in nats. Of the gradient: the L2 norm of the difference over its own, all
parameters together."""

OF_ONE_PARAMETER = 1e-4
"""The same for one parameter's gradient, or for a thousandth of the largest one. The decays of a gated delta net are
sums that cancel in float32; tests/unit/models/attention/test_recurrent.py compares them in float64."""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(params=LEARNING)
def family(request: pytest.FixtureRequest, family_folder: Folder) -> Learning:
    return learning(family_folder(request.param))


@pytest.fixture(params=WITH_IMAGES)
def seeing(request: pytest.FixtureRequest, family_folder: Folder) -> Learning:
    """A family with images."""
    return learning(family_folder(request.param))


def computed(
    policy: Policy, samples: Sequence[TrainingSample], packing: Packing
) -> tuple[list[Tensor], dict[str, Tensor], int]:
    """The logprobs of each sample's loss tokens, the gradients by name, and the number of rows."""
    totals = BatchTotals(int(sum(sample.loss_mask.sum() for sample in samples)), len(samples), max_new_tokens=8)
    found, rows = [torch.empty(0)] * len(samples), 0
    kernel = policy.kernel(shared=packing is Packing.tree)
    for batch in pack(samples, packing, 16384, policy.positions, policy.device, kernel=kernel, rules=policy.rules):
        logprobs, entropies = loss_logprobs(policy, batch, 1.0)
        tokens = LossTokens(logprobs, batch.inference_logprobs, batch.advantages, batch.sample_index, entropies)
        policy_loss(tokens, totals, AlgorithmConfig(entropy_coef=0.1)).loss.backward()  # type: ignore[no-untyped-call]
        rows += len(batch.token_ids)
        for index in set(batch.sample_index.tolist()):
            found[index] = logprobs.detach()[batch.sample_index == index]
    gradients = {name: p.grad for name, p in policy.model.named_parameters() if p.grad is not None}
    policy.model.zero_grad()
    return found, gradients, rows


def test_a_tree_is_the_sequences_one_by_one(family: Learning) -> None:
    policy = family.policy()
    ours, gradients, shared = computed(policy, family.samples, Packing.tree)
    theirs, wanted, rows = computed(policy, family.samples, Packing.none)
    assert shared < 0.7 * rows, "the samples share prefixes"
    for one, other in zip(ours, theirs, strict=True):
        assert float((one - other).abs().max()) <= TOLERANCE
    assert gradients.keys() == wanted.keys()
    apart = {name: float((gradients[name] - wanted[name]).norm()) for name in wanted}
    norms = {name: float(gradient.norm()) for name, gradient in wanted.items()}
    assert torch.tensor(list(apart.values())).norm() <= TOLERANCE * torch.tensor(list(norms.values())).norm()
    for name, norm in norms.items():
        assert apart[name] <= OF_ONE_PARAMETER * max(norm, 1e-3 * max(norms.values())), name


def averages(trainer: LocalTrainer) -> dict[str, Tensor]:
    """AdamW's averages by the names of the weights, as they are after the last step."""
    learner = trainer._learner
    return {
        f"{average}/{name}": value.clone()
        for name, weight in learner._weights.trainable().items()
        for average, value in learner._optimizer.state.get(weight, {}).items()
    }


def weights(trainer: LocalTrainer) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in trainer._learner._weights.state().items()}


def test_a_step_depends_on_the_pixels(seeing: Learning) -> None:
    """AdamW's first average is the gradient times 1 − β₁."""
    trainer, other = seeing.trainer(), seeing.trainer()
    before = weights(trainer)
    assert trainer.train_step(list(seeing.samples)).metrics["grad_norm"] > 1e-3
    other.train_step([blank(sample) for sample in seeing.samples])
    of_images = {id(parameter) for parameter in image_parameters(trainer._learner.policy.model)}
    moved = {True: 0, False: 0}
    for name, parameter in trainer._learner.policy.model.named_parameters():
        moved[id(parameter) in of_images] += not torch.equal(parameter, before[name])
    assert min(moved.values()) > 0, "the tower and the language model learn"
    found, grey = averages(trainer), averages(other)
    assert found.keys() == grey.keys()
    gradients = [name for name in found if name.startswith("exp_avg/")]
    apart = torch.stack([(found[name] - grey[name]).norm() for name in gradients]).norm()
    assert apart > 0.05 * torch.stack([found[name].norm() for name in gradients]).norm()


def test_a_resumed_run_is_the_run_that_never_stopped(family: Learning, tmp_path: Path) -> None:
    assert_resumed(family, tmp_path)


@pytest.mark.parametrize("name", ["gemma4", "qwen3_vl_moe"])
def test_a_resumed_run_of_adapters(name: str, family_folder: Folder, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    assert_resumed(learning(family_folder(name)).adapted(), tmp_path)


def assert_resumed(family: Learning, folder: Path) -> None:
    """Weights and AdamW's averages after two steps are equal bit for bit, with a checkpoint between them or without."""
    trainer, resumed = family.trainer(), family.trainer()
    trainer.train_step(list(family.samples))
    trainer.save(str(folder)).result()
    trainer.train_step(list(family.samples[1:]))
    resumed.load(str(folder))
    assert resumed.version == 1
    resumed.train_step(list(family.samples[1:]))
    for state in (weights, averages):
        wanted, found = state(trainer), state(resumed)
        assert wanted
        assert wanted.keys() == found.keys()
        for name, value in wanted.items():
            assert torch.equal(found[name], value), name


def test_adapters(family: Learning) -> None:
    """A step changes the adapter of every layer and nothing else; merged, the model computes the same."""
    pytest.importorskip("peft")
    adapted = family.adapted()
    trainer = adapted.trainer()
    samples = list(family.samples)
    before, start = weights(trainer), trainer.logprobs(samples)
    trainer.train_step(samples)
    moved = {name for name, weight in weights(trainer).items() if not torch.equal(weight, before[name])}
    assert all(".lora_" in name for name in moved)
    # B starts at zero, so weight decay does not move it. A layer that the model computes without calling it would leave
    # its adapter without a gradient.
    assert moved >= {name for name in before if ".lora_B." in name}
    merged = family.trainer()
    with torch.no_grad():
        plain = dict(merged._learner.policy.model.named_parameters())
        whole = trainer.weights()
        assert whole.keys() == plain.keys()
        for name, weight in whole.items():
            plain[name].copy_(weight)
    found, wanted = np.concatenate(merged.logprobs(samples)), np.concatenate(trainer.logprobs(samples))
    np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=1e-5)
    assert np.abs(wanted - np.concatenate(start)).max() > 1e-2


@pytest.mark.parametrize("frozen", ["freeze_vision", "freeze_language"])
def test_frozen_parts_stay(seeing: Learning, frozen: str) -> None:
    """The tower with what leads from it to the language model is one part, everything else the other."""
    trainer = seeing.frozen(**{frozen: True}).trainer()
    before = weights(trainer)
    metrics = trainer.train_step(list(seeing.samples)).metrics
    policy = trainer._learner.policy
    of_images = {id(parameter) for parameter in image_parameters(policy.model)}
    moved = {name for name, weight in weights(trainer).items() if not torch.equal(weight, before[name])}
    learning_part = frozen == "freeze_language"
    parts = {name: id(parameter) in of_images for name, parameter in policy.model.named_parameters()}
    assert moved
    assert {parts[name] for name in moved} == {learning_part}
    decoder = {id(parameter) for parameter in policy.model.base_model.get_decoder().parameters()}
    assert not decoder & of_images
    again = trainer.train_step(list(seeing.samples)).metrics
    assert metrics["images/encoded"] == 4
    assert again["images/encoded"] == (4 if learning_part else 0), "features of a frozen tower are kept"


def test_the_embedded_engine_samples_what_the_trainer_learns(family: Learning) -> None:
    """Before a step, and after it with the new weights."""
    trainer = family.trainer()
    engine = EmbeddedEngine(trainer._learner.policy, lambda: trainer.version, 1024)
    source = family.samples[0]
    length = len(source.token_ids) - 2
    prompt = Prompt(source.token_ids[:length], source.placeholders, source.mm_items)

    async def generate() -> Completion:
        async with engine.session("0") as session:
            return await session.generate(prompt, SamplingParams(4, 1.0, (), family.banned, trainer.version))

    for _ in range(2):
        completion = asyncio.run(generate())
        (found,) = trainer.logprobs([continued(source, length, completion)])
        np.testing.assert_allclose(completion.logprobs, found, atol=1e-4)
        trainer.train_step(list(family.samples))


def continued(source: TrainingSample, length: int, completion: Completion) -> TrainingSample:
    """The first `length` tokens of `source`, and a completion with a loss."""
    new = len(completion.token_ids)

    def joined(before: float, after: np.ndarray, dtype: type) -> np.ndarray:
        return np.concatenate([np.full(length, before), after]).astype(dtype)

    token_ids = np.concatenate([source.token_ids[:length], completion.token_ids])
    return replace(
        source,
        token_ids=token_ids,
        mm_token_type_ids=mm_token_type_ids(length + new, source.placeholders),
        loss_mask=joined(0, np.ones(new), bool),
        advantages=joined(0, np.ones(new), np.float32),
        inference_logprobs=joined(0, completion.logprobs, np.float32),
        versions=joined(-1, np.zeros(new), np.int64),
    )
