"""The task, the loss and the advantage function that the configuration names by an import path can be imported."""

from __future__ import annotations

from vlmrl.config.import_paths import is_import_path
from vlmrl.config.run import Mode, RunConfig


def imports_resolve(config: RunConfig) -> None:
    """Import what the configuration names by an import path."""
    if config.mode in (Mode.compare, Mode.check):  # `compare` reads files of past runs; `check` imports and reports
        return
    from vlmrl.tasks.loading import find_task

    find_task(config.task)
    if is_import_path(config.algorithm.loss):
        from vlmrl.trainer.loss import loss_function

        loss_function(config.algorithm.loss)
    if is_import_path(config.algorithm.advantage):
        from vlmrl.orchestrator.advantages import estimator_named

        estimator_named(config.algorithm.advantage)
