"""The embedded engine, compared with the trainer's logprobs and transformers' own forward; its batches, sessions and KV
cache."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

import vlmrl.inference.embedded.sampling as embedded_sampling
from support.helpers import BANNED, END, TEXT_TOKENS, Part, extended, image, plain_logits, prompt
from vlmrl.config.algorithm import AlgorithmConfig
from vlmrl.config.trainer import TrainerConfig
from vlmrl.errors import EngineError
from vlmrl.inference.embedded.engine import EmbeddedEngine
from vlmrl.models.families.positions import position_function
from vlmrl.models.policy import Policy
from vlmrl.trainer.objective import mismatch_kl
from vlmrl.trainer.trainer import LocalTrainer
from vlmrl.types import (
    Completion,
    ContractError,
    FloatArray,
    ImageItem,
    IntArray,
    MMItem,
    Placeholder,
    Prompt,
    SamplingParams,
    Supports,
    TrainingSample,
    mm_token_type_ids,
)

SYSTEM = list(range(40, 70))
MAX_MODEL_LEN = 2048
CLOSE = 2e-5
"""Nats. The order of rows changes the rounding; a wrong position or a stale key changes logprobs by 1e-2."""

positions = position_function("mrope", 2)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def policy(tiny_model: Callable[[], Any]) -> Policy:
    return Policy(tiny_model(), positions, BANNED)


def engine_of(policy: Policy, version: int = 0) -> EmbeddedEngine:
    return EmbeddedEngine(policy, lambda: version, MAX_MODEL_LEN)


def params(
    seed: int, *, temperature: float = 1.0, max_new_tokens: int = 6, stops: Sequence[int] = (END,)
) -> SamplingParams:
    return SamplingParams(max_new_tokens, temperature, tuple(stops), tuple(BANNED), seed)


Turns = list[tuple[Prompt, Completion]]


@dataclass(frozen=True)
class Episode:
    """A rollout without a task: a first prompt, then fixed replies, whatever the policy samples."""

    first: Prompt
    replies: tuple[tuple[Part, ...], ...]
    sampling: SamplingParams
    """For the first turn; turn t adds t to the seed."""

    async def play(self, engine: EmbeddedEngine, session: Any) -> Turns:
        turns: Turns = []
        async with session:
            asked = self.first
            for number, reply in enumerate([*self.replies, ()]):
                completion = await session.generate(asked, replace(self.sampling, seed=self.sampling.seed + number))
                turns.append((asked, completion))
                asked = extended(asked, completion.token_ids, *reply)
        return turns


def play(engine: EmbeddedEngine, episodes: Sequence[Episode]) -> list[Turns]:
    async def main() -> list[Turns]:
        sessions = [engine.session(str(i)) for i in range(len(episodes))]
        return await asyncio.gather(*(e.play(engine, s) for e, s in zip(episodes, sessions, strict=True)))

    return asyncio.run(main())


def group(size: int, *, number: int = 0, **sampling: Any) -> list[Episode]:
    """Siblings over three turns: images of several sizes, one of them twice, then a turn without images."""
    first = prompt(SYSTEM, [number], image(2, 3), [5, 6], image(1, 1, number), [7])
    replies: tuple[tuple[Part, ...], ...] = (([9, 8], image(3, 1), image(2, 3), 7), ([11, 12],))
    return [Episode(first, replies, params(1000 * number + 10 * i, **sampling)) for i in range(size)]


def sample_of(turns: Turns, name: str = "s") -> TrainingSample:
    last, completion = turns[-1]
    ids = np.concatenate([last.token_ids, completion.token_ids])
    mask, logprobs = np.zeros(len(ids), np.bool_), np.zeros(len(ids), np.float32)
    supports = [np.empty(0, np.int32)] * len(ids)
    for asked, said in turns:
        here = slice(len(asked.token_ids), len(asked.token_ids) + len(said.token_ids))
        mask[here], logprobs[here] = True, said.logprobs
        if said.supports is not None:
            supports[here] = np.split(said.supports.token_ids, said.supports.offsets[1:-1])
    return TrainingSample(
        rollout_id=name,
        token_ids=ids,
        mm_token_type_ids=mm_token_type_ids(len(ids), last.placeholders),
        loss_mask=mask,
        advantages=mask.astype(np.float32),
        inference_logprobs=logprobs,
        versions=np.where(mask, 0, -1),
        placeholders=last.placeholders,
        mm_items=last.mm_items,
        supports=Supports.of(supports),
    )


def trainer_logprobs(policy: Policy, episodes: Sequence[Turns]) -> FloatArray:
    trainer = LocalTrainer(
        policy, TrainerConfig(learning_rate=1.5e-3), AlgorithmConfig(), temperature=1.0, max_new_tokens=6
    )
    return np.concatenate(trainer.logprobs([sample_of(turns) for turns in episodes]))


def said(turns: Turns) -> list[list[int]]:
    return [completion.token_ids.tolist() for _, completion in turns]


def logprobs_of(turns: Turns) -> FloatArray:
    return np.concatenate([completion.logprobs for _, completion in turns])


def plain_distribution(
    model: Any, asked: Prompt, token_ids: Sequence[int] = (), temperature: float = 1.0
) -> FloatArray:
    """float64 [vocabulary]: probabilities of the token after the prompt and `token_ids`, from transformers alone."""
    ids = np.concatenate([asked.token_ids, np.array(token_ids, np.int64)])
    with torch.no_grad():
        logits = plain_logits(model, ids, mm_token_type_ids(len(ids), asked.placeholders), asked.images)[-1].double()
    logits[BANNED] = -torch.inf
    return np.asarray(torch.softmax(logits / temperature, -1).numpy())


# ── what is sampled ─────────────────────────────────────────────────────────────────────────────────────────


def test_logprobs_are_the_trainers_over_turns(policy: Policy) -> None:
    turns = play(engine_of(policy), [*group(6), *group(6, number=1), Episode(prompt([1, 2, 3]), (([4],),), params(77))])
    sampled, learned = np.concatenate([logprobs_of(t) for t in turns]), trainer_logprobs(policy, turns)
    assert float(np.abs(sampled - learned).max()) <= CLOSE
    assert mismatch_kl(torch.from_numpy(learned), torch.from_numpy(sampled))[1] <= 1e-9
    assert len({str(said(t)) for t in turns}) > 6, "siblings must differ for this to mean something"


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_a_completion_is_the_same_alone_and_in_a_batch(policy: Policy, temperature: float) -> None:
    episodes = [*group(4, temperature=temperature), *group(3, number=1), *group(2, number=2, temperature=0.5)]
    together = play(engine_of(policy), episodes)
    for episode, turns in zip(episodes, together, strict=True):
        (alone,) = play(engine_of(policy), [episode])
        assert said(alone) == said(turns)
        np.testing.assert_allclose(logprobs_of(alone), logprobs_of(turns), atol=CLOSE)


def test_greedy_is_the_argmax_of_a_plain_forward_token_by_token(policy: Policy, tiny_model: Callable[[], Any]) -> None:
    plain = tiny_model()
    for turns in play(engine_of(policy), group(1, temperature=0.0, max_new_tokens=4, stops=())):
        for asked, completion in turns:
            told: list[int] = []
            for token, logprob in zip(completion.token_ids.tolist(), completion.logprobs.tolist(), strict=True):
                probabilities = plain_distribution(plain, asked, told)
                assert token == probabilities.argmax()
                assert logprob == pytest.approx(np.log(probabilities[token]), abs=1e-5)
                told.append(token)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_probabilities_and_banned_tokens_never_come(
    policy: Policy, tiny_model: Callable[[], Any], temperature: float
) -> None:
    draws = 4000
    asked = prompt(SYSTEM, image(2, 2), [1])
    turns = play(
        engine_of(policy),
        [Episode(asked, (), params(i, temperature=temperature, max_new_tokens=1)) for i in range(draws)],
    )
    tokens = np.array([completion.token_ids[0] for ((_, completion),) in turns])
    assert not set(tokens.tolist()) & set(BANNED)
    probabilities = plain_distribution(tiny_model(), asked, temperature=temperature)
    said_logprobs = np.array([completion.logprobs[0] for ((_, completion),) in turns])
    np.testing.assert_allclose(said_logprobs, np.log(probabilities[tokens]), atol=1e-5)
    # Pearson's chi-square over cells of at least 20 expected draws, tokens in the order of their probability.
    order = np.argsort(probabilities)
    cells = np.floor((np.cumsum(probabilities[order]) - probabilities[order] / 2) * draws / 20).astype(int)
    expected = np.bincount(cells, probabilities[order]) * draws
    observed = np.bincount(cells, np.bincount(tokens, minlength=len(order))[order])
    held = expected > 5
    assert not observed[expected == 0].any()
    statistic = float(((observed - expected)[held] ** 2 / expected[held]).sum())
    degrees = int(held.sum()) - 1
    assert degrees > 20
    assert abs(statistic - degrees) < 4 * np.sqrt(2 * degrees)


@pytest.mark.parametrize(("top_k", "top_p"), [(3, 1.0), (0, 0.2), (20, 0.5)])
def test_a_truncated_request_next_to_others(
    policy: Policy, tiny_model: Callable[[], Any], top_k: int, top_p: float
) -> None:
    """Tokens come from the truncated distribution and their logprobs are its own; other requests do not change."""
    asked = prompt(SYSTEM, image(2, 2), [1])
    free = [Episode(asked, (), params(i, max_new_tokens=1)) for i in range(200)]
    cut = [replace(each, sampling=replace(each.sampling, top_k=top_k, top_p=top_p)) for each in free]
    turns = play(engine_of(policy), [*free, *cut])
    assert [said(each) for each in turns[:200]] == [said(each) for each in play(engine_of(policy), free)]
    probabilities = plain_distribution(tiny_model(), asked)
    order = np.argsort(-probabilities)
    kept = order[:top_k] if top_k else order
    shares = probabilities[kept] / probabilities[kept].sum()
    kept = kept[np.cumsum(shares) - shares < top_p]
    expected = dict(zip(kept.tolist(), np.log(probabilities[kept] / probabilities[kept].sum()), strict=True))
    found = [(int(c.token_ids[0]), float(c.logprobs[0])) for ((_, c),) in turns[200:]]
    assert all(logprob == pytest.approx(expected[token], abs=1e-4) for token, logprob in found)
    assert len({token for token, _ in found}) > 1


def test_what_is_truncated_is_learned_as_it_was_sampled(policy: Policy, tiny_model: Callable[[], Any]) -> None:
    """Each token comes with the tokens that it was sampled from, and the trainer's logprobs over them are the
    engine's. Over those of the next token, or over the whole vocabulary, they are not."""
    shape: dict[str, Any] = {"top_k": 9, "top_p": 0.8, "min_p": 0.05, "reports_support": True}
    asked = [replace(each, sampling=replace(each.sampling, **shape)) for each in group(4)]
    turns = play(engine_of(policy), asked)
    probabilities = plain_distribution(tiny_model(), asked[0].first)
    kept = np.flatnonzero(probabilities >= 0.05 * probabilities.max())
    kept = kept[np.argsort(-probabilities[kept])][:9]
    shares = probabilities[kept] / probabilities[kept].sum()
    expected = kept[np.cumsum(shares) - shares < 0.8]
    first = turns[0][0][1]
    assert first.supports is not None
    assert first.supports.token_ids[: first.supports.offsets[1]].tolist() == sorted(expected)
    assert first.logprobs[0] == pytest.approx(np.log(probabilities[first.token_ids[0]] / probabilities[expected].sum()))
    engine = np.concatenate([completion.logprobs for each in turns for _, completion in each])
    samples = [sample_of(each) for each in turns]
    trainer = LocalTrainer(policy, TrainerConfig(), AlgorithmConfig(), temperature=1.0, max_new_tokens=6)
    np.testing.assert_allclose(np.concatenate(trainer.logprobs(samples)), engine, atol=1e-5)
    whole = trainer.logprobs([replace(each, supports=None) for each in samples])
    assert np.abs(np.concatenate(whole) - engine).max() > 1e-2
    with pytest.raises(ContractError, match="that it was sampled from"):
        trainer.logprobs([replace(each, supports=shifted(each.supports)) for each in samples])


def shifted(supports: Supports | None) -> Supports:
    """Each token with the support of the next one."""
    assert supports is not None
    return supports.take(np.roll(np.arange(len(supports)), -1))


def test_supports_have_a_bound(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where `top_p` alone keeps nearly all tokens, the most probable ones are kept."""
    monkeypatch.setattr(embedded_sampling, "MAX_SUPPORT", 20)
    (episode,) = group(1)
    shape = replace(episode.sampling, top_p=0.9999, reports_support=True)
    ((_, completion), *_) = play(engine_of(policy), [replace(episode, sampling=shape)])[0]
    assert completion.supports is not None
    assert completion.supports.sizes.tolist() == [20] * len(completion.token_ids)


def test_a_stop_token_ends_the_completion_and_is_part_of_it(policy: Policy) -> None:
    (free,) = play(engine_of(policy), group(1, stops=(), max_new_tokens=6))
    tokens = free[0][1].token_ids.tolist()
    assert free[0][1].finish_reason == "length"
    stop = tokens[3]
    (cut,) = play(engine_of(policy), group(1, stops=(stop, END), max_new_tokens=6))
    assert cut[0][1].token_ids.tolist() == tokens[: tokens.index(stop) + 1]
    assert cut[0][1].finish_reason == "stop"


def test_two_temperatures_in_one_batch_are_learned_as_they_were_sampled(policy: Policy) -> None:
    """Siblings of one prompt at three temperatures: the trainer's logprobs are the engine's. With the temperatures of
    other siblings they are not."""
    given = [1.0, 0.5, 2.0, 0.5, 1.0, 2.0]
    asked = group(6, max_new_tokens=6)
    asked = [
        replace(each, sampling=replace(each.sampling, temperature=t)) for each, t in zip(asked, given, strict=True)
    ]
    turns = play(engine_of(policy), asked)
    trainer = LocalTrainer(
        policy, TrainerConfig(learning_rate=1.5e-3), AlgorithmConfig(), temperature=1.0, max_new_tokens=6
    )

    def kl(temperatures: Sequence[float]) -> float:
        samples = []
        for each, temperature in zip(turns, temperatures, strict=True):
            sample = sample_of(each)
            own = np.where(sample.loss_mask & (temperature != 1), temperature, np.nan).astype(np.float32)
            samples.append(replace(sample, temperatures=own))
        found, sampled = (
            np.concatenate(trainer.logprobs(samples)),
            np.concatenate([logprobs_of(each) for each in turns]),
        )
        return float(mismatch_kl(torch.from_numpy(found), torch.from_numpy(sampled))[0]) / len(found)

    assert kl(given) < 1e-10
    assert kl(given[1:] + given[:1]) > 1e-3


def spelled(token_ids: IntArray) -> str:
    return "".join(f"<{token}>" for token in token_ids if token != END)


def test_a_stop_string_ends_the_completion_at_the_token_that_completes_it(policy: Policy) -> None:
    """The tokens and their logprobs are those of a completion that goes on, bit for bit."""
    first = prompt(SYSTEM, image(2, 2), [1])
    free = params(3, stops=(END,), max_new_tokens=9)
    ((_, whole),) = play(engine_of(policy), [Episode(first, (), free)])[0]
    assert len(whole.token_ids) == 9, "the test needs a completion that no stop token ends"
    a, b, c = whole.token_ids[3:6].tolist()
    assert [a, b, c] not in (whole.token_ids[:3].tolist(), whole.token_ids[2:5].tolist())
    wanted = {
        f"<{a}><{b}><{c}>": (6, f"<{a}><{b}><{c}>"),
        f"<{a}><{b}": (5, f"<{a}><{b}"),
        "nowhere": (9, None),
    }
    engine = EmbeddedEngine(policy, lambda: 0, MAX_MODEL_LEN, spelled)
    asked = [Episode(first, (), replace(free, stop=(stop, "nowhere"))) for stop in wanted]
    asked.append(Episode(first, (), replace(free, stop=(f"<{a}><{b}><{c}>",), max_new_tokens=6)))
    found = [completion for ((_, completion),) in play(engine, asked)]
    for completion, (count, stop) in zip(found, [*wanted.values(), (6, f"<{a}><{b}><{c}>")], strict=True):
        assert completion.token_ids.tolist() == whole.token_ids[:count].tolist()
        assert completion.logprobs.tolist() == whole.logprobs[:count].tolist()
        assert (completion.stop, completion.finish_reason) == (stop, "length" if stop is None else "stop")


def test_a_stop_token_counts_before_the_stop_string_that_it_would_complete(policy: Policy) -> None:
    first = prompt(SYSTEM, image(2, 2), [1])
    ((_, whole),) = play(engine_of(policy), [Episode(first, (), params(3, stops=(), max_new_tokens=6))])[0]
    last = int(whole.token_ids[3])
    assert last not in whole.token_ids[:3]
    engine = EmbeddedEngine(policy, lambda: 0, MAX_MODEL_LEN, spelled)
    sampling = replace(params(3, stops=(last,), max_new_tokens=6), stop=(f"<{last}>",))
    ((_, ended),) = play(engine, [Episode(first, (), sampling)])[0]
    assert ended.token_ids.tolist() == whole.token_ids[:4].tolist()
    assert (ended.finish_reason, ended.stop) == ("stop", None)


def test_a_turn_after_a_stop_string_samples_from_what_was_sampled(policy: Policy) -> None:
    """The cache of the turn before holds the tokens up to the one that completed the stop string."""
    (free,) = play(engine_of(policy), group(1, max_new_tokens=6))
    stop = f"<{free[0][1].token_ids[2]}>"
    engine = EmbeddedEngine(policy, lambda: 0, MAX_MODEL_LEN, spelled)
    cut = [replace(each, sampling=replace(each.sampling, stop=(stop,))) for each in group(1, max_new_tokens=6)]
    (turns,) = play(engine, cut)
    assert turns[0][1].stop == stop
    np.testing.assert_allclose(logprobs_of(turns), trainer_logprobs(policy, [turns]), atol=CLOSE, rtol=0)


def test_each_request_keeps_its_own_budget_temperature_and_stops(policy: Policy) -> None:
    first = prompt(SYSTEM, image(2, 2), [1])
    wanted = [
        params(1, max_new_tokens=1, stops=()),
        params(1, max_new_tokens=9, stops=()),
        params(1, temperature=0.0, max_new_tokens=4, stops=()),
        params(1, temperature=0.0, max_new_tokens=7, stops=(END,)),
        params(2, temperature=0.3, max_new_tokens=3, stops=()),
    ]
    together = play(engine_of(policy), [Episode(first, (), sampling) for sampling in wanted])
    for sampling, ((_, completion),) in zip(wanted, together, strict=True):
        ((_, alone),) = play(engine_of(policy), [Episode(first, (), sampling)])[0]
        assert completion.token_ids.tolist() == alone.token_ids.tolist()
        assert len(completion.token_ids) <= sampling.max_new_tokens
        stopped = completion.token_ids[-1] in sampling.stop_token_ids
        assert completion.finish_reason == ("stop" if stopped else "length")
        assert stopped or len(completion.token_ids) == sampling.max_new_tokens
    assert len(together[1][0][1].token_ids) == 9


def test_the_same_schedule_gives_the_same_bits_whatever_order_they_arrive_in(policy: Policy) -> None:
    episodes = [*group(5), *group(4, number=1), *group(3, number=2)]
    once = play(engine_of(policy), episodes)
    again = play(engine_of(policy), episodes[::-1])[::-1]
    for a, b in zip(once, again, strict=True):
        assert said(a) == said(b)
        assert logprobs_of(a).tobytes() == logprobs_of(b).tobytes()


# ── the KV cache ────────────────────────────────────────────────────────────────────────────────────────────


def test_only_what_is_new_is_computed(policy: Policy) -> None:
    engine = engine_of(policy)
    episodes = group(3, stops=(), max_new_tokens=2)
    turns = play(engine, episodes)
    first = len(episodes[0].first.token_ids)
    replies = sum(len(prompt(*reply).token_ids) for reply in episodes[0].replies)
    # Siblings share their first prompt; each later turn computes the last sampled token and the reply.
    later = {(n, tuple(np.concatenate(said(t)[: n + 1]))) for t in turns for n in range(2)}
    assert len(later) == 6, "siblings must differ for the count below"
    counters = engine.metrics()
    assert counters["inference/rows_prefill"] == first + 3 * (2 + replies)
    assert engine.metrics()["inference/rows_prefill"] == 0


def test_siblings_that_sampled_the_same_tokens_share_rows(policy: Policy) -> None:
    engine = engine_of(policy)
    (one,) = play(engine, group(1, temperature=0.0, stops=()))
    alone = engine.metrics()
    many = play(engine_of(policy), group(5, temperature=0.0, stops=()))
    engine = engine_of(policy)
    play(engine, group(5, temperature=0.0, stops=()))
    assert engine.metrics() == alone
    assert all(said(turns) == said(one) for turns in many)


def test_a_distinct_image_is_encoded_once_per_version(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[str] = []
    encode = policy.encode_items

    def counted(images: Sequence[ImageItem]) -> Any:
        encoded.extend(item.hash for item in images)
        return encode(images)

    monkeypatch.setattr(policy, "encode_items", counted)
    play(engine_of(policy), [*group(2), *group(2, number=1)])
    assert sorted(encoded) == sorted({image(2, 3).hash, image(3, 1).hash, image(1, 1, 0).hash, image(1, 1, 1).hash})


def test_new_weights_are_used_and_no_entry_of_the_old_ones_is_read(policy: Policy) -> None:
    version = 0
    engine = EmbeddedEngine(policy, lambda: version, MAX_MODEL_LEN)
    episode = group(1, stops=())[0]
    held: list[Turns] = []

    async def main() -> None:
        nonlocal version
        async with engine.session("a") as session:
            completion = await session.generate(episode.first, episode.sampling)
            with torch.no_grad():
                for parameter in policy.model.parameters():
                    parameter.mul_(1.1)
            version = 3
            asked = extended(episode.first, completion.token_ids, *episode.replies[0])
            later = await session.generate(asked, episode.sampling)
            held.append([(episode.first, completion), (asked, later)])

    asyncio.run(main())
    (_, before), (asked, after) = held[0]
    assert before.versions.tolist() == [0] * 6
    assert after.versions.tolist() == [3] * 6
    ((_, fresh),) = play(engine_of(policy), [Episode(asked, (), episode.sampling)])[0]
    assert after.token_ids.tolist() == fresh.token_ids.tolist()
    assert after.logprobs.tobytes() == fresh.logprobs.tobytes()
    assert engine.metrics()["inference/rows_prefill"] == len(episode.first.token_ids) + len(asked.token_ids)


def test_keys_survive_the_growth_of_the_kv_cache(policy: Policy) -> None:
    """The first turn makes a KV cache of 4096 slots, and the second needs more."""
    random = np.random.default_rng(0)
    replies = [random.integers(0, TEXT_TOKENS, 700).tolist() for _ in range(6)]
    episodes = [
        Episode(prompt(SYSTEM, image(2, 2, i), [i]), ((reply,),), params(i, max_new_tokens=3, stops=()))
        for i, reply in enumerate(replies)
    ]
    engine = engine_of(policy)
    turns = play(engine, episodes)
    assert engine.metrics()["inference/rows_prefill"] > 4096
    sampled = np.concatenate([logprobs_of(t) for t in turns])
    assert float(np.abs(sampled - trainer_logprobs(policy, turns)).max()) <= CLOSE


def test_a_prompt_whose_every_token_another_session_holds(policy: Policy) -> None:
    """One session is a turn ahead of a new session with the same first prompt. The last token of that prompt must be
    computed again, because sampling needs its hidden state."""
    engine = engine_of(policy)
    episode = group(1, stops=())[0]
    late = params(5, stops=())

    async def main() -> tuple[Turns, Completion]:
        async with engine.session("ahead") as ahead:
            first = await ahead.generate(episode.first, episode.sampling)
            asked = extended(episode.first, first.token_ids, *episode.replies[0])
            async with engine.session("late") as session:
                second, completion = await asyncio.gather(
                    ahead.generate(asked, episode.sampling), session.generate(episode.first, late)
                )
            return [(episode.first, first), (asked, second)], completion

    turns, completion = asyncio.run(main())
    ((_, alone),) = play(engine_of(policy), [Episode(episode.first, (), late)])[0]
    assert completion.token_ids.tolist() == alone.token_ids.tolist()
    np.testing.assert_allclose(completion.logprobs, alone.logprobs, atol=CLOSE)
    np.testing.assert_allclose(logprobs_of(turns), trainer_logprobs(policy, [turns]), atol=CLOSE)


# ── sessions ────────────────────────────────────────────────────────────────────────────────────────────────

FIRST = prompt([1, 2, 3])


async def settle() -> None:
    """Let all other tasks run until they wait."""
    for _ in range(20):
        await asyncio.sleep(0)


def test_a_batch_waits_until_every_open_session_has_a_request_or_is_closed(policy: Policy) -> None:
    async def main() -> None:
        engine = engine_of(policy)
        a, b, c = (engine.session(name) for name in "abc")
        asking = asyncio.create_task(a.generate(FIRST, params(1)))
        await settle()
        also = asyncio.create_task(b.generate(FIRST, params(2)))
        await settle()
        assert not asking.done()
        assert not also.done()
        assert engine.metrics()["inference/rows_prefill"] == 0
        await c.__aexit__()
        await asyncio.gather(asking, also)
        assert engine.metrics()["inference/rows_prefill"] == len(FIRST.token_ids)
        await a.__aexit__()
        await b.generate(FIRST, params(3))  # b is the only open session

    asyncio.run(main())


def test_sessions_of_programs_do_not_wait_for_each_other(policy: Policy) -> None:
    """Two programs that play in turns: each sends its next request only after the other's answer."""

    async def main() -> None:
        engine = engine_of(policy)
        async with engine.session("a", is_awaited=False) as a, engine.session("b", is_awaited=False) as b:
            for seed in range(3):
                assert len((await a.generate(FIRST, params(seed))).token_ids)
                assert len((await b.generate(FIRST, params(seed))).token_ids)

    asyncio.run(main())


def test_programs_that_ask_together_share_a_batch(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test says when the quiet time is over."""
    begun: list[float] = []

    async def main() -> None:
        engine = engine_of(policy)
        monkeypatch.setattr(engine._quiet, "begin", begun.append)
        sessions = [engine.session(name, is_awaited=False) for name in "abcd"]
        engine.session("e", is_awaited=False)
        asking = []
        for session in sessions[:3]:
            asking.append(asyncio.create_task(session.generate(FIRST, params(1))))
            await settle()
        assert not any(each.done() for each in asking), "the quiet time is not over"
        assert begun == [0.0] * 3, "no session is missing before the first batch"
        engine._run()
        await asyncio.gather(*asking)
        assert engine.metrics()["inference/rows_prefill"] == len(FIRST.token_ids)

    asyncio.run(main())


def test_requests_of_one_program_may_overlap(policy: Policy) -> None:
    async def main() -> None:
        engine = engine_of(policy)
        async with engine.session("a", is_awaited=False) as session:
            both = await asyncio.gather(*(session.generate(FIRST, params(seed)) for seed in (1, 2)))
            alone = [await session.generate(FIRST, params(seed)) for seed in (1, 2)]
            assert [each.token_ids.tolist() for each in both] == [each.token_ids.tolist() for each in alone]

    asyncio.run(main())


def test_agents_of_one_program_each_go_on_from_the_cache(policy: Policy) -> None:
    async def main() -> list[tuple[int, int]]:
        engine = engine_of(policy)
        computed = []
        async with engine.session("a", is_awaited=False) as session:
            conversations = [prompt([agent, 1, 2, 3, 4, 5, 6, 7]) for agent in range(3)]
            for seed in range(3):
                for agent, asked in enumerate(conversations):
                    completion = await session.generate(asked, params(seed))
                    rows = int(engine.metrics()["inference/rows_prefill"])
                    conversations[agent] = extended(asked, completion.token_ids, [8, 9])
                    computed.append((seed, rows))
        return computed

    # The whole prompt once; then the last token of the answer, which was never an input, and the two after it.
    assert asyncio.run(main()) == [(0, 8)] * 3 + [(1, 3)] * 3 + [(2, 3)] * 3


def test_a_program_waits_for_a_session_that_is_awaited(policy: Policy) -> None:
    async def main() -> None:
        engine = engine_of(policy)
        task, program = engine.session("a"), engine.session("b", is_awaited=False)
        asking = asyncio.create_task(program.generate(FIRST, params(1)))
        await asyncio.sleep(0.1)  # far longer than the first quiet time
        assert not asking.done()
        await asyncio.gather(asking, task.generate(FIRST, params(2)))

    asyncio.run(main())


def test_the_kv_cache_of_programs_is_bounded(policy: Policy) -> None:
    """A server of foreign programs may never be without an open session."""

    async def main() -> tuple[list[list[int]], int]:
        engine = EmbeddedEngine(policy, lambda: 0, max_model_len=30)
        engine.session("idle", is_awaited=False)
        said, most = [], 0
        async with engine.session("a", is_awaited=False) as session:
            for seed in range(60):
                asked = prompt([seed, 1, 2, 3, 4, 5, 6, 7])
                completion = await session.generate(asked, params(seed))
                more = await session.generate(extended(asked, completion.token_ids, [8, 9]), params(seed))
                said.append([*completion.token_ids.tolist(), *more.token_ids.tolist()])
                most = max(most, engine._generator.cached_slots)
        return said, most

    async def fresh(seed: int) -> list[int]:
        asked = prompt([seed, 1, 2, 3, 4, 5, 6, 7])
        async with engine_of(policy).session("a") as session:
            completion = await session.generate(asked, params(seed))
            more = await session.generate(extended(asked, completion.token_ids, [8, 9]), params(seed))
        return [*completion.token_ids.tolist(), *more.token_ids.tolist()]

    said, most = asyncio.run(main())
    assert most <= 4 * 30 * 2 + 30
    assert said == [asyncio.run(fresh(seed)) for seed in range(60)]


def test_a_cancelled_request_neither_stalls_the_batch_nor_joins_it(policy: Policy) -> None:
    async def main() -> None:
        engine = engine_of(policy)

        async def one_turn(name: str, asked: Prompt) -> Completion:
            async with engine.session(name) as session:
                return await session.generate(asked, params(1))

        other = engine.session("b")
        asking = asyncio.create_task(one_turn("a", prompt([9, 9, 9, 9])))
        await settle()
        asking.cancel()
        await settle()
        assert asking.cancelled()
        completion = await other.generate(FIRST, params(1))
        assert len(completion.token_ids)
        assert engine.metrics()["inference/rows_prefill"] == len(FIRST.token_ids)

    asyncio.run(main())


def test_a_cancelled_request_of_an_open_session_does_not_count_for_it(policy: Policy) -> None:
    async def main() -> None:
        engine = engine_of(policy)
        a, b = engine.session("a"), engine.session("b")
        asking = asyncio.create_task(a.generate(prompt([9, 9, 9, 9]), params(1)))
        await settle()
        asking.cancel()
        other = asyncio.create_task(b.generate(FIRST, params(1)))
        await settle()
        assert not other.done(), "a has not sent another request yet"
        again = await a.generate(FIRST, params(2))
        assert len(again.token_ids)
        await other
        assert engine.metrics()["inference/rows_prefill"] == len(FIRST.token_ids)

    asyncio.run(main())


def test_a_request_during_a_batch_that_is_cancelled_is_answered(tiny_model: Callable[[], Any]) -> None:
    """The batch's only session closes while the batch runs, so no event but its end can start the next batch."""
    gate = threading.Event()

    def held(length: int, placeholders: Sequence[Placeholder], items: Sequence[MMItem]) -> IntArray:
        gate.wait()
        return positions(length, placeholders, items)

    async def main() -> Completion:
        engine = engine_of(Policy(tiny_model(), held, BANNED))

        async def one_turn(name: str) -> Completion:
            async with engine.session(name) as session:
                return await session.generate(FIRST, params(1))

        running = asyncio.create_task(one_turn("a"))
        await settle()
        waiting = asyncio.create_task(one_turn("b"))
        await settle()
        running.cancel()
        await settle()
        assert running.cancelled()
        gate.set()
        return await asyncio.wait_for(waiting, 30)

    assert len(asyncio.run(main()).token_ids)


def test_a_prompt_that_is_too_long_fails_alone(policy: Policy) -> None:
    async def main() -> None:
        engine = EmbeddedEngine(policy, lambda: 0, max_model_len=20)

        async def one_turn(length: int) -> Completion:
            async with engine.session(str(length)) as session:
                return await session.generate(prompt(list(range(length))), params(1, max_new_tokens=6))

        fits, too_long = await asyncio.gather(one_turn(14), one_turn(15), return_exceptions=True)
        assert isinstance(fits, Completion)
        assert isinstance(too_long, EngineError)
        assert "15 tokens + max_new_tokens=6 exceeds inference.max_model_len=20" in str(too_long)

    asyncio.run(main())


def test_a_closed_session_is_refused(policy: Policy) -> None:
    async def main() -> None:
        engine = engine_of(policy)
        async with engine.session("a") as session:
            pass
        with pytest.raises(EngineError, match="closed"):
            await session.generate(FIRST, params(1))
        await engine.stop()
        await engine.stop()

    asyncio.run(main())
