"""What is well typed and cannot run is refused here, before anything is started or submitted.

A check is a function of the RunConfig that raises `ConfigError`; its message says `a=x requires b, else <consequence>:
<remedy>`. Left out on purpose: whatever takes the model, the data or the machine to find out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from vlmrl.checks.engine import context_holds_samples, embedded_is_in_step, kinds_are_chosen, weights_reach_engine
from vlmrl.checks.learning import algorithm_is_known, groups_have_siblings, mode_has_work, optimizer_fits
from vlmrl.checks.model import (
    gradients_have_range,
    random_has_size,
    renderer_is_there,
    renderer_serves_family,
    tiny_is_a_model,
)
from vlmrl.checks.ranges import numbers_in_range
from vlmrl.checks.task import squares_fill_patches, task_has_class
from vlmrl.config import RunConfig

Check: TypeAlias = Callable[[RunConfig], None]

CHECKS: tuple[Check, ...] = (
    renderer_is_there,
    renderer_serves_family,
    numbers_in_range,
    kinds_are_chosen,
    gradients_have_range,
    weights_reach_engine,
    embedded_is_in_step,
    context_holds_samples,
    algorithm_is_known,
    groups_have_siblings,
    mode_has_work,
    optimizer_fits,
    task_has_class,
    squares_fill_patches,
    random_has_size,
    tiny_is_a_model,
)
"""All of them, in the order in which they run."""


def check(config: RunConfig) -> None:
    """Refuse a config that is well typed and cannot run. Raises ConfigError."""
    for holds in CHECKS:
        holds(config)
