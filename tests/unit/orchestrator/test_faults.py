"""A run ends after three steps in a row in which every rollout failed, and not earlier."""

from __future__ import annotations

import pytest

from vlmrl.errors import EngineError, TooManyFaultsError, VlmrlError
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
TOO_MANY_FRAMES = (StopReason.FRAMES_FULL, DropReason.EMPTY)
LOST = (StopReason.ENGINE_ERROR, DropReason.FAULT)
NOT_SCORED = (StopReason.TERMINATED, DropReason.NO_REWARD)
PLAYED = (StopReason.TERMINATED, None)


@pytest.mark.parametrize(
    ("last", "kind", "message"),
    [
        (
            step(RAISED, RAISED, error="LookupError: no row 17"),
            TooManyFaultsError,
            r"\(3 of 4\) they ended as task_error: LookupError: no row 3\. List .* mode=faults run=outputs/a, ",
        ),
        (
            step(TOO_LONG, TOO_LONG),
            TooManyFaultsError,
            r"\(4 of 5\) they ended as context_full: the first prompt leaves no room",
        ),
        (
            step(TOO_MANY_FRAMES, TOO_MANY_FRAMES, TOO_MANY_FRAMES),
            TooManyFaultsError,
            r"\(3 of 6\) they ended as frames_full: the videos of the first prompt have too many frames",
        ),
        (
            step(NOT_SCORED, NOT_SCORED, NOT_SCORED),
            TooManyFaultsError,
            r"\(3 of 6\) they ended as no_reward: every reward term abstained, as most do where a row has no answer",
        ),
        (step(*[LOST] * 5, error="gone"), EngineError, r"\(5 of 7\) they ended as engine_error: gone"),
    ],
)
def test_the_third_step_in_a_row_ends_the_run(last: list[Group], kind: type[VlmrlError], message: str) -> None:
    watch = FaultWatch(run="outputs/a")
    watch.check(1, step(RAISED, error="LookupError: no row 3"))
    watch.check(2, step(TOO_LONG) if last[0].rollouts[0].error else step(TOO_LONG, TOO_LONG))
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


@pytest.mark.parametrize(
    ("steps", "rate"),
    [
        ([step(RAISED, *[PLAYED] * 3)] * 3, 0.25),
        ([step(RAISED, PLAYED), step(*[PLAYED] * 4), step(*[PLAYED] * 4)], 0.1),
        # What our own engine lost is not counted, on neither side.
        ([step(RAISED, LOST, LOST, *[PLAYED] * 3)] * 3, 0.25),
        # A prompt that is too long is no fault of a row: it may fit into a longer context.
        ([step(TOO_LONG, *[PLAYED] * 3)] * 3, 0.0),
    ],
)
def test_more_faults_than_the_rate_allows_end_the_run(steps: list[list[Group]], rate: float) -> None:
    at_most, below = FaultWatch(max_fault_rate=max(rate, 0.001)), FaultWatch(max_fault_rate=rate - 0.01)
    for number, groups in enumerate(steps[:-1], start=1):
        at_most.check(number, groups)
        below.check(number, groups)  # one step alone does not end a run
    at_most.check(3, steps[-1])
    if rate > 0:
        with pytest.raises(
            TooManyFaultsError, match=rf"were faults, more than task.max_fault_rate={rate - 0.01:g}; most"
        ):
            below.check(3, steps[-1])


def test_the_rate_is_that_of_the_last_steps_alone() -> None:
    watch = FaultWatch(max_fault_rate=0.3)
    for number in range(1, 10):
        watch.check(number, step(*[PLAYED] * 4))
    watch.check(10, step(RAISED, *[PLAYED] * 3))
    watch.check(11, step(*[PLAYED] * 4))
    with pytest.raises(TooManyFaultsError, match=r"5 of the last 12 rollouts \(42%\) were faults"):
        watch.check(12, step(*[RAISED] * 4, error="no row"))


@pytest.mark.parametrize(("begun", "ends"), [(1, True), (2, False), (9, False)])
def test_a_short_run_is_judged_and_the_short_rest_of_a_long_one_is_not(begun: int, ends: bool) -> None:
    """The steps before the resume are not known, and an undisturbed run is judged with them."""
    watch = FaultWatch()
    watch.check(begun, step(RAISED, RAISED))
    watch.check(begun + 1, step(RAISED))
    if ends:
        with pytest.raises(TooManyFaultsError, match="every rollout of the last 2 steps failed"):
            watch.finish()
    else:
        watch.finish()
    with pytest.raises(TooManyFaultsError, match="every rollout of the last 3 steps failed"):
        watch.check(begun + 2, step(RAISED))
