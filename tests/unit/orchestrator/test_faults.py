"""A run ends after three steps in a row in which every rollout failed, and not earlier."""

from __future__ import annotations

import pytest

from vlmrl.errors import EngineError, TaskError, VlmrlError
from vlmrl.orchestrator.faults import FaultWatch
from vlmrl.types import DropReason, Group, Rollout, StopReason


def step(*ends: tuple[StopReason, DropReason | None], error: str | None = None) -> list[Group]:
    """A step with one group, one rollout per entry of `ends`."""
    rollouts = [
        Rollout(
            rollout_id=f"train/000001/00/{index:02d}",
            problem_id="p",
            index=index,
            turns=[],
            reward=0.0,
            metrics={},
            stop_reason=stop_reason,
            error=error,
            dropped=dropped,
        )
        for index, (stop_reason, dropped) in enumerate(ends)
    ]
    return [Group("p", rollouts)]


RAISED = (StopReason.TASK_ERROR, DropReason.FAULT)
TOO_LONG = (StopReason.CONTEXT_FULL, DropReason.EMPTY)
PLAYED = (StopReason.TERMINATED, None)


@pytest.mark.parametrize(
    ("last", "kind", "message"),
    [
        (
            step(RAISED, RAISED, error="LookupError: no row"),
            TaskError,
            "of step 3 ended as task_error: LookupError: no row",
        ),
        (step(TOO_LONG, RAISED), TaskError, "ended as context_full: the first prompt leaves no room"),
        (step((StopReason.ENGINE_ERROR, DropReason.FAULT), error="gone"), EngineError, "ended as engine_error: gone"),
    ],
)
def test_the_third_step_in_a_row_ends_the_run(last: list[Group], kind: type[VlmrlError], message: str) -> None:
    watch = FaultWatch()
    watch.check(1, step(RAISED, TOO_LONG))
    watch.check(2, step(TOO_LONG))
    with pytest.raises(kind, match=message):
        watch.check(3, last)


@pytest.mark.parametrize(
    "between",
    [
        step(RAISED, PLAYED),
        step((StopReason.TERMINATED, DropReason.ZERO_ADVANTAGE), (StopReason.MAX_TURNS, DropReason.STALE)),
        step((StopReason.MAX_NEW_TOKENS, DropReason.STRAY_IMAGE_TOKEN)),
    ],
)
def test_one_rollout_that_did_not_fail_resets_the_count(between: list[Group]) -> None:
    """Also where it was dropped: equal rewards, for example, are not a fault."""
    watch = FaultWatch()
    for number in range(1, 40):
        watch.check(number, between if number % 3 == 0 else step(RAISED))
