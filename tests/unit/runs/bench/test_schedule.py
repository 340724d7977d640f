"""How many steps of mode=bench warm up."""

from __future__ import annotations

import pytest

from vlmrl.runs.bench.schedule import Schedule


@pytest.mark.parametrize(
    ("max_staleness", "waited", "warmup"),
    [
        (0, [0.0, 0.0, 0.0], 2),  # an on-policy run has no batches ahead
        (1, [0.3, 0.0, 0.0], 2),
        (1, [0.0, 0.0, 0.01, 0.5], 5),
        (1, [0.0] * 20, 6),  # both sides are equally fast
        (2, [0.5, 0.0, 0.0, 0.0, 0.28, 0.1], 6),  # as measured; step 2 warms up anyway
    ],
)
def test_warm_up_lasts_until_a_side_waits(max_staleness: int, waited: list[float], warmup: int) -> None:
    schedule = Schedule(max(2, max_staleness + 1), 4, max_staleness)
    lasts = []
    for step, share in enumerate(waited, 2):
        if step > schedule.last:
            break
        schedule.took(step, share)
        lasts.append(schedule.last)
    assert schedule.warmup == warmup
    assert schedule.last == warmup + 4 <= schedule.longest
    assert lasts == sorted(lasts), "the end is put off and never comes nearer"
