"""The position in the data: what follows from a config, from a checkpoint, and from an older checkpoint."""

from __future__ import annotations

from collections.abc import Callable

from vlmrl.config.run import RunConfig
from vlmrl.orchestrator.supervised import AFTER_WARMUP
from vlmrl.runs.position import Cursors, Position
from vlmrl.trainer.loop_state import Cursor, LoopState

SIZES = "orchestrator.groups_per_step={}", "trainer.warmup.batch_size={}", "trainer.warmup.rl_batch_size={}"


def test_a_new_run_begins_at_the_first_problem(run_config: Callable[..., RunConfig]) -> None:
    config = run_config(*(size.format(number) for size, number in zip(SIZES, (4, 5, 6), strict=True)))
    position = Position(Cursors.of(config))
    assert position.rl.take(1, 4) == [0, 1, 2, 3]
    assert position.warmup.take(1, 2) == [0, 1]
    assert position.rl_demonstrations.take(1, 1) == [(AFTER_WARMUP + 1) * 6]
    assert position.after(1, 1) == Cursors(Cursor(4), Cursor(2), Cursor((AFTER_WARMUP + 1) * 6 + 1))
    assert position.after(0, 0) == Cursors(Cursor(4), Cursor(2), Cursor((AFTER_WARMUP + 1) * 6 + 1)), "steps are made"


def test_what_is_under_way_comes_again(run_config: Callable[..., RunConfig]) -> None:
    position = Position(Cursors.of(run_config()))
    for step in (1, 2, 3):
        position.rl.take(step, 2)
    position.warmup.take(1, 3)
    after = position.after(version=1, supervised_steps=0)
    assert (after.rl, after.warmup) == (Cursor(2), Cursor(0))


def test_a_checkpoint_says_what_comes_next(run_config: Callable[..., RunConfig]) -> None:
    config = run_config(*(size.format(2) for size in SIZES))
    state = LoopState((), False, Cursor(100, ((90, 91),)), Cursor(200), Cursor(300))
    position = Position(Cursors.of(config, version=7, supervised_steps=9).restored(state))
    assert position.rl.take(8, 2) == [90, 100]
    assert position.warmup.take(10, 1) == [200]
    assert position.rl_demonstrations.take(8, 1) == [300]


def test_an_older_checkpoint_was_where_its_own_config_says(run_config: Callable[..., RunConfig]) -> None:
    before = run_config(*(size.format(4) for size in SIZES))
    cursors = Cursors.of(before, version=2, supervised_steps=5).restored(LoopState())
    assert cursors == Cursors(Cursor(8), Cursor(20), Cursor((AFTER_WARMUP + 3) * 4))
