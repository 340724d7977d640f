"""What a reward term sees, and what it returns."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from vlmrl.rewards.base import Attempt, PerAttempt, RewardError
from vlmrl.types import StopReason

ATTEMPT = Attempt("train/000001/00/00", "row 0", (), "B", "B", reference="B", columns={}, images=())


def test_a_function_that_raises_costs_the_attempt_that_it_was_given() -> None:
    """The others of the group keep their values."""

    def first_letter(attempt: Attempt) -> float | None:
        return float(attempt.completion[0] == attempt.reference)

    attempts = [ATTEMPT, replace(ATTEMPT, completion=""), replace(ATTEMPT, completion="A")]
    first, second, third = asyncio.run(PerAttempt(first_letter).score(attempts))
    assert (first, third) == (1.0, 0.0)
    assert isinstance(second, RewardError)
    assert second.text.startswith("the reward raised IndexError: string index out of range")
    assert "first_letter" in (second.traceback or "")
    assert second.stop_reason is StopReason.REWARD_ERROR


def test_a_function_may_abstain() -> None:
    assert asyncio.run(PerAttempt(lambda attempt: None).score([ATTEMPT])) == [None]
