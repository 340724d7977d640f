"""How a client's values take the place of the run's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vlmrl.orchestrator.sampling import OwnSampling, Truncation
from vlmrl.types import Completion, Prompt, SamplingParams, Supports, Turn, TurnSampling

OWN = OwnSampling(0.8, (9,), (3, 4), Truncation(top_k=50), stop=("END",))
SEED = 5


def test_the_run_samples_in_its_own_way() -> None:
    params = OWN.params(16, SEED)
    assert params == SamplingParams(16, 0.8, (9,), (3, 4), SEED, top_p=1.0, top_k=50, stop=("END",))
    assert OWN.differs(params, SEED) is None


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ({"temperature": 0.8}, None),
        ({"temperature": 0.5}, TurnSampling(0.5, 1.0, 50)),
        ({"top_p": 0.9}, TurnSampling(None, 0.9, 50)),
        ({"top_k": 0}, TurnSampling(None, 1.0, 0)),
        ({"temperature": 0.0, "top_p": 0.9}, TurnSampling(0.0, 1.0, 0)),
        ({"stop": ["END", "x"]}, None),
    ],
)
def test_what_a_client_changes_is_noted(asked: dict[str, Any], found: TurnSampling | None) -> None:
    params = OWN.params(16, SEED, **asked)
    assert OWN.differs(params, SEED) == found
    assert params.stop == tuple(dict.fromkeys(("END", *asked.get("stop", ()))))
    assert (params.stop_token_ids, params.banned_token_ids) == ((9,), (3, 4))


def test_another_seed_is_noted() -> None:
    assert OWN.differs(OWN.params(16, 7), SEED) == TurnSampling(None, 1.0, 50, seed=7)


@pytest.mark.parametrize(
    "asked",
    [
        *({"temperature": value} for value in (-1.0, 1e-12, 1e7, float("nan"), float("inf"))),
        *({"top_p": value} for value in (0.0, -0.5, 1.5, float("nan"))),
        *({"top_k": value} for value in (-1, 2**31)),
        *({"stop": value} for value in ([""], ["x", ""], ["\ufffd"])),
    ],
)
def test_a_value_that_cannot_be_sampled_with_is_refused(asked: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(asked)).replace("stop", "stop string")):
        OWN.params(16, SEED, **asked)


def test_an_engine_reports_the_supports_of_what_is_truncated() -> None:
    truncation = Truncation(top_p=0.9, min_p=0.05, reported=None)
    own = OwnSampling(1.0, (9,), (), truncation)
    assert (own.params(16, SEED).min_p, own.params(16, SEED).reports_support) == (0.05, True)
    greedy = own.params(16, SEED, temperature=0)
    assert (greedy.top_p, greedy.min_p, greedy.reports_support) == (1.0, 0.0, False)
    free = OwnSampling(1.0, (9,), (), Truncation(reported=None))
    assert [free.params(16, SEED, top_p=top_p).reports_support for top_p in (None, 1.0, 0.9)] == [False, False, True]


def test_an_engine_may_report_the_supports_of_top_k_alone() -> None:
    own = OwnSampling(1.0, (9,), (), Truncation(reported=50))
    asked = ({"top_k": 50}, {"top_k": 5, "top_p": 0.9}, {"top_k": 51}, {"top_p": 0.9}, {"temperature": 0, "top_k": 5})
    assert [own.params(16, SEED, **each).reports_support for each in asked] == [True, True, False, False, False]


@pytest.mark.parametrize(
    ("sampling", "without", "with_supports"),
    [
        (None, True, True),
        (TurnSampling(0.5), True, True),
        (TurnSampling(2.0, seed=3), True, True),
        (TurnSampling(seed=3), True, True),
        (TurnSampling(0.0), False, False),
        (TurnSampling(1.0, top_p=0.99), False, True),
        (TurnSampling(1.0, top_k=100), False, True),
    ],
)
def test_a_truncated_distribution_is_learned_from_where_its_supports_are_known(
    sampling: TurnSampling | None, without: bool, with_supports: bool
) -> None:
    for supports, expected in ((None, without), (Supports.of([[4, 9]]), with_supports)):
        completion = Completion(np.array([4]), np.zeros(1, np.float32), np.zeros(1, np.int64), "stop", None, supports)
        turn = Turn(Prompt(np.array([1]), (), ()), completion, "", [], 0, 0.0, sampling=sampling)
        assert turn.is_learnable is expected
