"""Distillation from whole distributions equals NumPy's, TRL's, and one sample at a time by transformers."""

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

from support.helpers import BANNED, plain_logits
from support.learning import batch, scored
from vlmrl.config.algorithm import AlgorithmConfig, DistillConfig, Divergence
from vlmrl.config.model import LoraConfig
from vlmrl.config.trainer import Packing, TrainerConfig
from vlmrl.models.families.positions import position_function
from vlmrl.models.head import most_likely, token_and_top_logprobs
from vlmrl.models.logit_map import IDENTITY
from vlmrl.models.lora import add_adapters
from vlmrl.models.policy import Policy
from vlmrl.trainer import distill
from vlmrl.trainer.forward import policy_scores
from vlmrl.trainer.loss import BatchTotals, LossOutput, LossTokens
from vlmrl.trainer.objective import policy_loss
from vlmrl.trainer.packing import pack
from vlmrl.trainer.reference import FrozenCopy, Reference, WithoutAdapters
from vlmrl.trainer.trainer import LocalTrainer
from vlmrl.types import TrainingSample

Array = NDArray[np.float64]
Make = Callable[[], Any]

TOKENS, VOCABULARY = 7, 9
BETA = 0.3


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


# ── the formulas ────────────────────────────────────────────────────────────────────────────────────────────


def distributions(seed: int) -> tuple[Array, Array]:
    """A teacher and a policy, float64 [TOKENS, VOCABULARY] probabilities."""
    random = np.random.default_rng(seed)
    logits = random.normal(0, 2, (2, TOKENS, VOCABULARY))
    odds = np.exp(logits)
    teacher, policy = odds / odds.sum(-1, keepdims=True)
    return teacher, policy


def merged(q: Array, p: Array, k: int) -> tuple[list[Array], list[Array]]:
    """Both distributions at the k tokens that q finds most likely, and the rest as one outcome, if there is one."""
    found: tuple[list[Array], list[Array]] = [], []
    for teacher, policy in zip(q, p, strict=True):
        first = sorted(range(VOCABULARY), key=lambda token: -teacher[token])[:k]
        others = [token for token in range(VOCABULARY) if token not in first]
        for each, distribution in zip(found, (teacher, policy), strict=True):
            rest = [distribution[others].sum()] if others else []
            each.append(np.array([*distribution[first], *rest]))
    return found


def kl(p: Array, q: Array) -> float:
    return float(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True)))


def wanted_divergence(q: Array, p: Array, each: Divergence) -> float:
    """Of one token: teacher q, policy p."""
    mixture = BETA * q + (1 - BETA) * p
    return {
        Divergence.forward: lambda: kl(q, p),
        Divergence.reverse: lambda: kl(p, q),
        Divergence.jensen_shannon: lambda: BETA * kl(q, mixture) + (1 - BETA) * kl(p, mixture),
    }[each]()


def tokens_of(q: Array, p: Array, k: int) -> LossTokens:
    """As the learner makes them: the logits are the hidden states, and the head is the identity."""
    random = np.random.default_rng(0)
    head, none = torch.eye(VOCABULARY), torch.zeros(VOCABULARY, dtype=torch.bool)
    rows = torch.arange(TOKENS)
    teacher, policy = torch.tensor(np.log(q)), torch.tensor(np.log(p), requires_grad=True)
    parts = (head.double(), None, none, rows, rows % VOCABULARY, 1.0, IDENTITY)
    found = most_likely(teacher, *parts, k)[1]
    assert found is not None
    ids, top = found
    logprobs, entropies, own = token_and_top_logprobs(policy, *parts, ids)
    return LossTokens(
        logprobs=logprobs,
        inference_logprobs=torch.tensor(-random.exponential(size=TOKENS)),
        advantages=torch.tensor(random.normal(size=TOKENS)),
        sample_index=rows,
        entropies=entropies,
        reference_top_ids=ids,
        reference_top_logprobs=top,
        top_logprobs=own,
    )


def assert_divergence(each: Divergence, k: int) -> None:
    """The loss with the term is the loss without it, plus the weight times the mean of the divergences."""
    totals = BatchTotals(tokens=2 * TOKENS, samples=3, max_new_tokens=5)
    for seed in range(3):
        q, p = distributions(seed)
        tokens = tokens_of(q, p, k)
        config = AlgorithmConfig(distill=DistillConfig(top_k=k, weight=0.4, divergence=each, beta=BETA))
        with_it, without = (
            policy_loss(tokens, totals, replace(config, distill=replace(config.distill, weight=weight)))
            for weight in (0.4, 0.0)
        )
        values = [wanted_divergence(a, b, each) for a, b in zip(*merged(q, p, k), strict=True)]
        exact = [wanted_divergence(a, b, each) for a, b in zip(q, p, strict=True)]
        found = float(with_it.loss.detach() - without.loss.detach())
        np.testing.assert_allclose(found, 0.4 * sum(values) / totals.tokens, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(float(with_it.sums["distill/divergence"]), sum(values), rtol=1e-5, atol=1e-6)
        assert (np.array(values) <= np.array(exact) + 1e-12).all(), "merging makes no divergence larger"
        if k == VOCABULARY:
            np.testing.assert_allclose(values, exact, rtol=1e-12)


@pytest.mark.parametrize("k", [1, 3, VOCABULARY])
@pytest.mark.parametrize("each", Divergence)
def test_each_divergence_is_its_formula(each: Divergence, k: int) -> None:
    assert_divergence(each, k)


Function = Callable[[Tensor, Tensor, DistillConfig], Tensor]

divergence = distill.divergence

MISTAKES: dict[str, Function] = {
    "sign": lambda q, p, config: -divergence(q, p, config),
    "the other way round": lambda q, p, config: divergence(p, q, config),
    "a token late": lambda q, p, config: divergence(q.roll(1, 0), p, config),
    "wrong divisor": lambda q, p, config: divergence(q, p, config) * len(q) / 5,
    "renormalized over the k": lambda q, p, config: divergence(
        torch.log_softmax(q[:, :-1], -1), torch.log_softmax(p[:, :-1], -1), config
    ),
}


@pytest.mark.parametrize("each", Divergence)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found(mistake: str, each: Divergence, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmrl.trainer.objective.divergence", MISTAKES[mistake])
    with pytest.raises(AssertionError):
        assert_divergence(each, k=3)


POLICY = [[1.0, -0.5, 0.25, 2.0, -1.5], [0.1, 0.2, 0.3, -0.4, 3.0]]
TEACHER = [[0.5, 1.5, -0.75, 0.0, -1.0], [2.0, -1.0, 0.5, 0.7, 0.9]]
OF_TRL: dict[float, tuple[list[float], list[list[float]]]] = {
    0.0: (
        [2.288059661970909, 2.6571436481265147],
        [
            [0.01216095, -0.97270893, 0.04616339, 0.93546991, -0.02108532],
            [-0.93426279, 0.01145965, -0.08371814, -0.1387414, 1.14526267],
        ],
    ),
    1.0: (
        [1.5910845481797378, 1.7061180029548153],
        [
            [-0.38907371, -0.15138688, -0.07152187, 0.6330579, -0.02107545],
            [-0.11751937, -0.02656887, -0.08743271, -0.04559372, 0.27711467],
        ],
    ),
    0.5: (
        [0.3591616252309384, 0.40315613076615003],
        [
            [-0.04641979, -0.04811617, -0.0035277, 0.1026859, -0.00462224],
            [-0.03817212, -0.00224362, -0.01921136, -0.01295647, 0.07258357],
        ],
    ),
    0.1: (
        [0.16436311312282942, 0.18695218891965312],
        [
            [-0.00828304, -0.03987686, 0.00105688, 0.04902825, -0.00192523],
            [-0.03323229, -0.00001088, -0.0078339, -0.00839751, 0.04947458],
        ],
    ),
}
"""What `GKDTrainer.generalized_jsd_loss(policy, teacher, beta=…, temperature=0.7, reduction="none").sum(-1)` of TRL
1.16 returned for these logits in float64, and the gradient of its sum. Its β = 0 is the forward KL, its β = 1 the
reverse one."""


def assert_as_trl(beta: float) -> None:
    each = {0.0: Divergence.forward, 1.0: Divergence.reverse}.get(beta, Divergence.jensen_shannon)
    config = DistillConfig(divergence=each, beta=beta or 0.5)
    rows, none = torch.arange(2), torch.zeros(5, dtype=torch.bool)
    policy = torch.tensor(POLICY, requires_grad=True)
    parts = (torch.eye(5), None, none, rows, rows, 0.7, IDENTITY)
    likely = most_likely(torch.tensor(TEACHER), *parts, 5)[1]
    assert likely is not None
    ids, top = likely
    found = distill.divergence(top, token_and_top_logprobs(policy, *parts, ids)[2], config)
    (slope,) = torch.autograd.grad(found.sum(), policy)
    values, gradient = OF_TRL[beta]
    np.testing.assert_allclose(found.detach(), values, rtol=1e-5)
    np.testing.assert_allclose(slope, gradient, atol=1e-6)


@pytest.mark.parametrize("beta", OF_TRL)
def test_values_and_gradients_are_those_of_trl(beta: float) -> None:
    assert_as_trl(beta)


@pytest.mark.parametrize("mistake", ["sign", "the other way round", "a token late", "wrong divisor"])
def test_a_mistake_next_to_trl_is_found(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill, "divergence", MISTAKES[mistake])
    with pytest.raises(AssertionError):
        assert_as_trl(0.1)


# ── on the tree ─────────────────────────────────────────────────────────────────────────────────────────────


def policy_of(model: Any) -> Policy:
    return Policy(model, position_function("mrope", 2), BANNED)


def other(model: Any) -> Any:
    """A model with other weights."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model


def trainer_of(
    policy: Policy,
    reference: Reference,
    each: Divergence = Divergence.reverse,
    *,
    k: int = 6,
    weight: float = 1.0,
    packing: Packing = Packing.tree,
) -> LocalTrainer:
    algorithm = AlgorithmConfig(distill=DistillConfig(top_k=k, weight=weight, divergence=each, beta=BETA))
    config = TrainerConfig(
        max_steps=10, learning_rate=1e-2, eps=1e-2, max_grad_norm=0.5, packing=packing, micro_batch_tokens=60
    )
    return LocalTrainer(policy, config, algorithm, temperature=0.7, max_new_tokens=4, reference=reference)


def unrewarded() -> list[TrainingSample]:
    """Samples of siblings with images, some of them equal, at temperatures of their own; nothing is rewarded."""
    return [replace(each, advantages=np.zeros_like(each.advantages)) for each in batch(own_temperatures=True)]


def plain_divergence(teacher: Any, policy: Any, samples: list[TrainingSample], each: Divergence, k: int) -> Tensor:
    """The mean divergence of the loss tokens, by transformers, one sample at a time, from whole distributions."""
    allowed = torch.tensor(np.setdiff1d(np.arange(len(teacher.get_output_embeddings().weight)), BANNED))
    values = []
    for s in samples:
        where = np.flatnonzero(s.loss_mask)
        own = np.full(len(where), np.nan) if s.temperatures is None else s.temperatures[where]
        temperature = torch.tensor(np.where(np.isnan(own), 0.7, own))[:, None]
        q, p = (
            torch.log_softmax(
                plain_logits(model, s.token_ids, s.mm_token_type_ids, s.mm_items)[where - 1].double()[:, allowed]
                / temperature,
                -1,
            )
            for model in (teacher, policy)
        )
        ids = q.topk(k).indices
        is_top = torch.zeros_like(q, dtype=torch.bool).scatter_(1, ids, True)
        q, p = (
            torch.cat([x.gather(1, ids), x.masked_fill(is_top, -torch.inf).logsumexp(-1, keepdim=True)], 1)
            for x in (q.detach(), p)
        )
        mixture = torch.log(BETA * q.exp() + (1 - BETA) * p.exp())
        match each:
            case Divergence.forward:
                values.append((q.exp() * (q - p)).sum(-1))
            case Divergence.reverse:
                values.append((p.exp() * (p - q)).sum(-1))
            case Divergence.jensen_shannon:
                of_both = BETA * q.exp() * (q - mixture) + (1 - BETA) * p.exp() * (p - mixture)
                values.append(of_both.sum(-1))
    return torch.cat(values).mean()


@pytest.mark.parametrize(
    ("each", "packing"),
    [
        (Divergence.forward, Packing.tree),
        (Divergence.reverse, Packing.tree),
        (Divergence.jensen_shannon, Packing.tree),
        (Divergence.reverse, Packing.none),
    ],
)
def test_the_gradient_of_the_tree_is_that_of_one_by_one(each: Divergence, packing: Packing, tiny_model: Make) -> None:
    """With images, temperatures of single turns, banned tokens, and tokens that siblings share."""
    policy, teacher = policy_of(tiny_model()), policy_of(other(tiny_model()))
    trainer = trainer_of(policy, FrozenCopy(teacher, offload=False), each, packing=packing)
    samples = scored(trainer, unrewarded())
    totals = BatchTotals(int(sum(s.loss_mask.sum() for s in samples)), len(samples), 4)
    config = AlgorithmConfig(distill=DistillConfig(top_k=6, weight=1.0, divergence=each, beta=BETA))
    total = 0.0
    for part in pack(samples, packing, 60, policy.positions, policy.device):
        tokens = policy_scores(policy, part, 0.7, with_values=False).loss_tokens(part)
        loss = policy_loss(tokens, totals, config).loss
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    plain, plain_teacher = tiny_model(), other(tiny_model())
    wanted = plain_divergence(plain_teacher, plain, samples, each, k=6)
    wanted.backward()  # type: ignore[no-untyped-call]
    assert total == pytest.approx(float(wanted.detach()), rel=1e-5)
    gradients = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    size = max(float(gradient.norm()) for gradient in gradients.values())
    for name, parameter in policy.model.named_parameters():
        if name in gradients:
            error = float((parameter.grad - gradients[name]).norm())
            assert error <= 1e-5 * max(float(gradients[name].norm()), 1e-3 * size), (name, error, size)


@pytest.mark.parametrize("each", Divergence)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_teacher_that_is_the_policy_gives_no_gradient(each: Divergence, dtype: torch.dtype, tiny_model: Make) -> None:
    copy = FrozenCopy(policy_of(other(tiny_model()).to(dtype)), offload=False, begins=True)
    trainer = trainer_of(policy_of(tiny_model().to(dtype)), copy, each)
    metrics = trainer.train_step(scored(trainer, unrewarded())).metrics
    assert metrics["grad_norm"] <= 1e-7
    assert abs(metrics["distill/divergence"]) <= 1e-7
    assert 0 < metrics["distill/tail"] < 1


def test_the_policy_learns_what_the_teacher_does(tiny_model: Make) -> None:
    copy = FrozenCopy(policy_of(other(tiny_model())), offload=False)
    trainer = trainer_of(policy_of(tiny_model()), copy, Divergence.forward)
    found = [trainer.train_step(scored(trainer, unrewarded())).metrics["distill/divergence"] for _ in range(6)]
    assert found[-1] < 0.7 * found[0]


def test_adapters_that_are_off_are_a_teacher(tiny_model: Make) -> None:
    pytest.importorskip("peft")
    model = tiny_model()
    torch.manual_seed(0)
    add_adapters(model, LoraConfig(rank=4))
    policy = policy_of(model)
    trainer = trainer_of(policy, WithoutAdapters(policy), weight=0.1)
    first = trainer.reference_scores(batch())
    for _ in range(3):
        result = trainer.train_step(scored(trainer, batch()))
    assert result.metrics["distill/divergence"] > 1e-6
    for then, now in zip(first, trainer.reference_scores(batch()), strict=True):
        assert then.top is not None
        assert now.top is not None
        assert np.array_equal(then.top.ids, now.top.ids)
        assert np.array_equal(then.top.logprobs, now.top.logprobs)


def test_a_checkpoint_continues_as_if_it_had_not_stopped(tiny_model: Make, tmp_path: Path) -> None:
    def make() -> tuple[Any, LocalTrainer]:
        copy = FrozenCopy(policy_of(other(tiny_model())), offload=False, begins=True, decay=0.5)
        policy = policy_of(tiny_model())
        return policy.model, trainer_of(policy, copy, Divergence.jensen_shannon)

    model, trainer = make()
    for _ in range(2):
        trainer.train_step(scored(trainer, batch()))
    trainer.save(str(tmp_path)).result()
    again, resumed = make()
    resumed.load(str(tmp_path))
    for each in (trainer, resumed):
        each.train_step(scored(each, batch()))
    for (name, weight), own in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(weight, own), name


def test_a_loss_of_ones_own_reads_the_top_tokens(tiny_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where no divergence is a term of the loss; the columns of all three belong together."""
    seen: list[LossTokens] = []

    def mine(tokens: LossTokens, totals: BatchTotals, config: AlgorithmConfig) -> LossOutput:
        assert tokens.top_logprobs is not None
        seen.append(tokens)
        return LossOutput(-tokens.top_logprobs[:, 0].sum() / totals.tokens)

    monkeypatch.setattr("vlmrl.trainer.objective.loss_function", lambda name: mine)
    trainer = trainer_of(policy_of(tiny_model()), FrozenCopy(policy_of(other(tiny_model())), offload=False), weight=0.0)
    metrics = trainer.train_step(scored(trainer, batch())).metrics
    assert metrics["grad_norm"] > 0
    assert metrics["distill/divergence"] > 0
    for tokens in seen:
        ids, teacher, policy = tokens.reference_top_ids, tokens.reference_top_logprobs, tokens.top_logprobs
        assert ids is not None
        assert teacher is not None
        assert policy is not None
        assert ids.shape == (len(tokens.logprobs), 6)
        assert teacher.shape == policy.shape == (len(tokens.logprobs), 7)
        assert (teacher[:, :5] >= teacher[:, 1:6]).all()
        assert not torch.isin(ids, torch.tensor(BANNED)).any()
        for each in (teacher, policy.detach()):
            torch.testing.assert_close(each.exp().sum(-1), torch.ones(len(each)), rtol=1e-5, atol=0)
