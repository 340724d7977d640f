"""How a client's values take the place of the run's."""

from __future__ import annotations

from typing import Any

import pytest

from vlmrl.orchestrator.sampling import OwnSampling
from vlmrl.types import SamplingParams, TurnSampling

OWN = OwnSampling(0.8, (9,), (3, 4), top_k=50, stop=("END",))
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


@pytest.mark.parametrize(
    ("sampling", "learnable"),
    [
        (TurnSampling(0.5), True),
        (TurnSampling(2.0, seed=3), True),
        (TurnSampling(seed=3), True),
        (TurnSampling(0.0), False),
        (TurnSampling(1.0, top_p=0.99), False),
        (TurnSampling(1.0, top_k=100), False),
    ],
)
def test_only_the_whole_distribution_is_learned_from(sampling: TurnSampling, learnable: bool) -> None:
    assert sampling.is_learnable is learnable
