"""What is named by an import path can be imported: task, rewards, tools, loss, advantage function and renderer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from vlmrl.config.import_paths import is_import_path
from vlmrl.config.run import Mode, RunConfig
from vlmrl.config.task import tasks_of
from vlmrl.preflight.rules.reward import all_tasks

T = TypeVar("T")


def imports_resolve(config: RunConfig) -> None:
    """Import what the configuration names by an import path."""
    if config.mode in (Mode.compare, Mode.check):  # `compare` reads files of past runs; `check` imports and reports
        return
    from vlmrl.rewards.loading import load_terms
    from vlmrl.tasks.loading import find_task
    from vlmrl.tasks.mixture import keys_at
    from vlmrl.tools.loading import load_tools

    for key, task in all_tasks(config).items():
        for own_key, own in {key: task, **tasks_of(task, key)}.items():
            with keys_at(own_key):
                find_task(own)
            load_terms(own.reward, refused_to_run, f"{own_key}.reward")
    load_terms(config.reward, refused_to_run)
    load_tools(config.tool)
    if is_import_path(config.algorithm.loss):
        from vlmrl.trainer.loss import loss_function

        loss_function(config.algorithm.loss)
    if is_import_path(config.algorithm.advantage):
        from vlmrl.orchestrator.advantages import estimator_named

        estimator_named(config.algorithm.advantage)
    if config.mode is Mode.play and is_import_path(config.play.policy):
        from vlmrl.tasks.scripted import ScriptedPolicy

        ScriptedPolicy(config.play.policy)
    renderer = config.orchestrator.renderer
    if renderer is not None and is_import_path(renderer.name):
        from vlmrl.rendering.package import Renderers

        Renderers(renderer.name, renderer.options)


async def refused_to_run(call: Callable[[], T]) -> T:
    """In place of the threads in which a run calls reward functions: here they are made and not called."""
    raise AssertionError("no reward is computed before the run")
