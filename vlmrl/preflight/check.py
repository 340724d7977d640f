"""What is well typed and cannot run is refused here, before anything is started or submitted.

A check is a function of the RunConfig that raises `ConfigError`; its message says `a=x requires b, else <consequence>:
<remedy>`. Left out on purpose: whatever takes the model, the data or the machine to find out (`places`
looks at the machine's GPUs).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from vlmrl.config import ranges
from vlmrl.config.run import RunConfig
from vlmrl.preflight.rules import engine, learning, model, ranks, secrecy, task

Check: TypeAlias = Callable[[RunConfig], None]

CHECKS: tuple[Check, ...] = (
    secrecy.no_secret_is_recorded,
    model.renderer_is_there,
    model.renderer_serves_family,
    ranges.numbers_in_range,
    engine.kinds_are_chosen,
    engine.servers_have_one_place,
    engine.experts_are_served,
    engine.weights_reach_engine,
    engine.embedded_is_in_step,
    engine.context_holds_samples,
    learning.algorithm_is_known,
    learning.groups_have_siblings,
    learning.batches_are_learned_from,
    ranks.ranks_here_work_together,
    learning.filters_can_find,
    learning.mode_has_work,
    learning.optimizer_fits,
    task.task_has_class,
    task.squares_fill_patches,
    task.episode_has_room,
    model.random_has_size,
    model.something_learns,
    model.tiny_is_a_model,
)
"""All of them, in the order in which they run."""


def check(config: RunConfig) -> None:
    """Refuse a config that is well typed and cannot run. Raises ConfigError."""
    for holds in CHECKS:
        holds(config)
