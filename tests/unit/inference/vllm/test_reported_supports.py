"""The supports that vLLM reports: what is left of a truncated distribution, or a refusal where more is left."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vlmrl.inference.vllm.frames import ResponseReader, pack_answer
from vlmrl.inference.vllm.reported_supports import supports_of
from vlmrl.types import Supports

IDS = np.array([[7, 3, 7, 1, 9], [1, 1, 8, 9, 4]])


def logs(*rows: list[float]) -> Any:
    with np.errstate(divide="ignore"):
        return np.log(np.array(rows, np.float32))


def test_the_support_is_what_can_be_sampled() -> None:
    found = supports_of(IDS, logs([0.2, 0.5, 0.2, 0.2, 0.1], [1.0, 1.0, 0.0, 0.0, 0.0]))
    assert (found.token_ids.tolist(), found.sizes.tolist()) == ([1, 3, 7, 9, 1], [4, 1])


@pytest.mark.parametrize(
    ("ids", "row"),
    [
        ([7, 3, 7, 1, 9], [0.2, 0.4, 0.2, 0.2, 0.1]),  # a tenth of the probability is elsewhere
        ([6, 3, 7, 1, 9], [0.2, 0.5, 0.2, 0.2, 0.1]),  # the sampled token is not among those reported
        ([9, 3, 7, 1, 9], [0.0, 0.5, 0.3, 0.2, 0.0]),  # it is, and cannot be sampled
    ],
)
def test_a_support_that_is_not_wholly_reported_is_refused(ids: list[int], row: list[float]) -> None:
    with pytest.raises(ValueError, match="was sampled from more than the 4 reported tokens"):
        supports_of(np.array([ids]), logs(row))


@pytest.mark.parametrize("supports", [Supports.of([[3, 70000], [9]]), None])
def test_supports_travel_with_the_tokens(supports: Supports | None) -> None:
    ((_, response),) = ResponseReader().feed(pack_answer(0, [3, 9], [-0.5, 0.0], None, "length", supports))
    answer = response.answer()
    assert (answer.token_ids.tolist(), answer.logprobs.tolist()) == ([3, 9], [-0.5, 0.0])
    found = answer.supports and (answer.supports.token_ids.tolist(), answer.supports.offsets.tolist())
    assert found == (supports and ([3, 70000, 9], [0, 2, 3]))
