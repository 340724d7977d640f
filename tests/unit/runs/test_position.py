"""The position in the data: what follows from a config, from a checkpoint, and from an older checkpoint."""

from __future__ import annotations

from collections.abc import Callable

from vlmrl.config.run import RunConfig
from vlmrl.orchestrator.supervised import AFTER_WARMUP
from vlmrl.runs.position import Cursor, Position
from vlmrl.trainer.loop_state import LoopState

SIZES = "orchestrator.groups_per_step={}", "trainer.warmup.batch_size={}", "trainer.warmup.rl_batch_size={}"


def test_a_new_run_begins_at_the_first_problem(run_config: Callable[..., RunConfig]) -> None:
    config = run_config(*(size.format(number) for size, number in zip(SIZES, (4, 5, 6), strict=True)))
    position = Position.of(config)
    assert [position.rl.first_of(step) for step in (1, 2, 3)] == [0, 4, 8]
    assert [position.warmup.first_of(step) for step in (1, 2, 3)] == [0, 5, 10]
    assert [position.rl_demonstrations.first_of(step) for step in (1, 2)] == [
        (AFTER_WARMUP + 1) * 6,
        (AFTER_WARMUP + 2) * 6,
    ]


def test_a_checkpoint_says_what_comes_next(run_config: Callable[..., RunConfig]) -> None:
    config = run_config(*(size.format(2) for size in SIZES))
    state = LoopState(cursor=100, warmup_cursor=200, rl_demonstrations_cursor=300)
    position = Position.of(config, version=7, supervised_steps=9).restored(state, config)
    assert [position.rl.first_of(step) for step in (8, 9)] == [100, 102]
    assert [position.warmup.first_of(step) for step in (10, 11)] == [200, 202]
    assert [position.rl_demonstrations.first_of(step) for step in (8, 9)] == [300, 302]


def test_an_older_checkpoint_was_where_its_own_config_says(run_config: Callable[..., RunConfig]) -> None:
    before, now = (run_config(*(size.format(number) for size in SIZES)) for number in (4, 3))
    position = Position.of(before, version=2, supervised_steps=5).restored(LoopState(), now)
    assert position.rl == Cursor(2, 8, 3)
    assert position.warmup == Cursor(5, 20, 3)
    assert position.rl_demonstrations == Cursor(2, (AFTER_WARMUP + 3) * 4, 3)
