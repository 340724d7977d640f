"""Several ranks sample what one process samples, from copies of the weights and from slices of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from support import TESTS, sampling_ranks
from support.helpers import image, prompt
from support.ranks import ended, start
from vlmrl.errors import NonFiniteLossError
from vlmrl.inference.embedded.generator import Generator
from vlmrl.inference.embedded.ranked import Answered, RankedGenerator, RankSampler, SampleShare, dealt
from vlmrl.inference.embedded.requests import Request, SessionCache
from vlmrl.types import Completion, SamplingParams

CASES = ("whole", "kept whole", "replicated", "frozen")
"""Of learning.py: sliced, whole through a step, a copy on each rank, sliced but for the tower."""


@pytest.fixture(scope="module", params=[2, 3])
def ranks(
    request: pytest.FixtureRequest, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    out = tmp_path_factory.mktemp("sampled")
    script = str(TESTS / "support/sampling_ranks.py")
    for rank, each in enumerate(ended(start(request.param, [script, str(tiny_folder), str(out), *CASES]))):
        assert each.code == 0, f"rank {rank}: {each.err}"
    return {case: dict(np.load(out / f"{case}.npz")) for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_ranks_sample_what_one_process_samples(case: str, ranks: dict[str, dict[str, Any]], tiny_folder: Path) -> None:
    """Over two turns, before and after a step; with stop strings, which only rank 0 can find."""
    wanted = sampling_ranks.found(str(tiny_folder), case, None)
    found = ranks[case]
    for number in (0, 1):
        assert found[f"{number}/tokens"].tolist() == wanted[f"{number}/tokens"].tolist()
        assert found[f"{number}/lengths"].tolist() == wanted[f"{number}/lengths"].tolist()
        assert found[f"{number}/stops"].tolist() == wanted[f"{number}/stops"].tolist()
        np.testing.assert_allclose(found[f"{number}/logprobs"], wanted[f"{number}/logprobs"], atol=2e-5)
        assert "<1" in wanted[f"{number}/stops"]
        prefill, decode = found[f"{number}/rows"] / wanted[f"{number}/rows"]
        assert 1 <= prefill < 2, "each rank computes the prompts of its own share"
        assert 0.9 < decode < 1.5
    assert wanted["0/tokens"].tolist() != wanted["1/tokens"].tolist()


# ── dealing, in one process ─────────────────────────────────────────────────────────────────────────────────


class Echo(Generator):
    """Notes its requests, and answers each with its seed."""

    def __init__(self) -> None:
        self.batches: list[list[Request]] = []
        self.cleared = self.forgotten = 0
        self.fails = False

    def run(self, requests: Any, version: int, intake: Any = None) -> list[Completion]:
        if self.fails:
            raise NonFiniteLossError("planted")
        self.batches.append(list(requests))
        seeds = [np.array([request.sampling.seed]) for request in requests]
        return [Completion(seed, np.zeros(1, np.float32), np.array([version]), "stop") for seed in seeds]

    def take_counters(self) -> dict[str, float]:
        return {"inference/rows_prefill": 1.0, "inference/rows_decode": 2.0}

    def clear_cache(self) -> None:
        self.cleared += 1

    def forget_weights(self) -> None:
        self.forgotten += 1


class Group:
    """Ranks in one process."""

    def __init__(self, ranks: int, *, weights_move: bool = False) -> None:
        self.generators = [Echo() for _ in range(ranks)]
        samplers = [RankSampler(each, weights_move=weights_move) for each in self.generators[1:]]
        self.sent: list[tuple[SampleShare, ...]] = []

        def together(commands: Any, own: Any) -> tuple[Answered, list[Answered]]:
            self.sent.append(tuple(commands))
            return own(), [sampler.sample(command) for sampler, command in zip(samplers, commands, strict=True)]

        self.generator = RankedGenerator(self.generators[0], ranks, together, weights_move=weights_move)

    def seeds(self) -> list[list[int]]:
        """Of the last batch, by rank."""
        batches = [each.batches[-1] if each.batches else [] for each in self.generators]
        return [[request.sampling.seed for request in batch] for batch in batches]


def ask(group: int, seed: int, session: SessionCache | None = None, **others: Any) -> Request:
    shown = prompt([1, 2], image(1, 1, group), [3])
    sampling = SamplingParams(4, temperature=1.0, stop_token_ids=(), banned_token_ids=(), seed=seed, **others)
    return Request(shown, sampling, session or SessionCache())


def test_siblings_stay_together_and_sessions_where_they_began() -> None:
    """Also where prompts differ in their images alone, and requests come in the order of their seeds."""
    group = Group(2)
    asked = [ask(seed % 2, seed) for seed in range(8)]
    assert [each.token_ids[0] for each in group.generator.run(asked, 0)] == list(range(8))
    assert sorted(group.seeds()) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    first = group.seeds()
    later = [ask(5, request.sampling.seed, request.session) for request in asked[:5]]
    group.generator.run([*later, ask(6, 20), ask(6, 21)], 0)
    again = group.seeds()
    for rank in (0, 1):
        assert set(again[rank]) - {20, 21} == set(first[rank]) & set(range(5))
        assert {20, 21} & set(again[rank])
    assert group.generator.take_counters() == {"inference/rows_prefill": 4.0, "inference/rows_decode": 8.0}


def test_sessions_on_other_ranks_are_forgotten_when_they_end() -> None:
    group = Group(2)
    asked = [ask(seed, seed) for seed in range(4)]
    group.generator.run(asked, 0)
    there = {each.session for each in group.sent[-1][0].asked}
    assert group.sent[-1][0].closed == ()
    del asked
    for each in group.generators:
        each.batches.clear()
    group.generator.run([ask(9, 9), ask(8, 8)], 0)
    assert set(group.sent[-1][0].closed) == there
    group.generator.clear_cache()
    assert [each.cleared for each in group.generators] == [1, 0]
    group.generator.run([ask(7, 7), ask(6, 6)], 1)
    assert [each.cleared for each in group.generators] == [1, 1]
    assert group.sent[-1][0].closed == ()
    group.generator.run([ask(7, 7), ask(6, 6)], 1)
    assert not group.sent[-1][0].starts_anew


def test_only_rank_0_looks_for_stop_strings() -> None:
    group = Group(2)
    group.generator.run([ask(0, 0), ask(1, 1, stop=("x",))], 0)
    assert group.seeds() == [[0, 1], []]


def test_pictures_for_people_are_not_sent_and_prompts_are_sent_once() -> None:
    group = Group(2)
    shared = prompt([1], image(2, 2))
    asked = [Request(shared, ask(0, seed).sampling, SessionCache()) for seed in range(4)]
    group.generator.run(asked, 0)
    sent = group.sent[-1][0].asked
    assert len(sent) == 2
    assert len({id(each.prompt) for each in sent}) == 1
    (item,) = sent[0].prompt.images
    assert item.pixels.size == 0
    assert item.mm_kwargs is shared.images[0].mm_kwargs
    assert shared.images[0].pixels.size > 0


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_any_rank_is_raised_when_all_have_answered(rank: int) -> None:
    group = Group(2)
    group.generators[rank].fails = True
    with pytest.raises(NonFiniteLossError, match="planted"):
        group.generator.run([ask(0, 0), ask(1, 1)], 0)
    assert len(group.generators[1 - rank].batches) == 1


def test_graphs_are_dropped_where_weights_move() -> None:
    for moves in (False, True):
        group = Group(3, weights_move=moves)
        group.generator.run([ask(seed, seed) for seed in range(2)], 0)
        assert [each.forgotten for each in group.generators] == [int(moves)] * 3


@given(st.lists(st.integers(1, 40), min_size=1, max_size=20), st.integers(1, 6))
def test_every_rank_gets_about_as_much(groups: list[int], ranks: int) -> None:
    found, total = dealt(groups, ranks), sum(groups)
    assert len(found) == total
    assert found == sorted(found)
    counts = Counter(found)
    assert max(counts) < ranks
    assert all(abs(counts[rank] - total / ranks) <= total / (2 * ranks) + 1 for rank in range(ranks))
