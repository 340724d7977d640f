"""vlmrl trains vision-language models with reinforcement learning. `python -m vlmrl --help` shows the command line.

The names below are what a task, a reward, a loss or an advantage of your own needs:

    from vlmrl import Image, Message, Reply, Task

Each name is imported on first use, so `import vlmrl` imports neither torch nor numpy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlmrl.config.algorithm import AlgorithmConfig
    from vlmrl.config.task import ImportedTaskConfig
    from vlmrl.errors import ConfigError
    from vlmrl.orchestrator.advantages import Estimator
    from vlmrl.orchestrator.credit import Comparison
    from vlmrl.rewards.base import Attempt
    from vlmrl.tasks.base import BadRow, Env, NotInSplit, Preference, Problem, Reply, Split, StepInfo, Task
    from vlmrl.tasks.check import check_task
    from vlmrl.trainer.loss import BatchTotals, LossFunction, LossOutput, LossTokens
    from vlmrl.types import FloatArray, Image, Message, Text, ToolCall, Video

    __version__: str

__all__ = [
    "AlgorithmConfig",
    "Attempt",
    "BadRow",
    "BatchTotals",
    "Comparison",
    "ConfigError",
    "Env",
    "Estimator",
    "FloatArray",
    "Image",
    "ImportedTaskConfig",
    "LossFunction",
    "LossOutput",
    "LossTokens",
    "Message",
    "NotInSplit",
    "Preference",
    "Problem",
    "Reply",
    "Split",
    "StepInfo",
    "Task",
    "Text",
    "ToolCall",
    "Video",
    "__version__",
    "check_task",
]

_HOMES = {
    "vlmrl.config.algorithm": ("AlgorithmConfig",),
    "vlmrl.config.task": ("ImportedTaskConfig",),
    "vlmrl.errors": ("ConfigError",),
    "vlmrl.orchestrator.advantages": ("Estimator",),
    "vlmrl.orchestrator.credit": ("Comparison",),
    "vlmrl.rewards.base": ("Attempt",),
    "vlmrl.tasks.base": ("BadRow", "Env", "NotInSplit", "Preference", "Problem", "Reply", "Split", "StepInfo", "Task"),
    "vlmrl.tasks.check": ("check_task",),
    "vlmrl.trainer.loss": ("BatchTotals", "LossFunction", "LossOutput", "LossTokens"),
    "vlmrl.types": ("FloatArray", "Image", "Message", "Text", "ToolCall", "Video"),
}
"""Module → the public names that it defines."""


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if not TYPE_CHECKING:  # a type checker must not take this function as permission for every name

    def __getattr__(name: str) -> object:
        import importlib

        if name == "__version__":
            value: object = _version()
        elif home := next((module for module, names in _HOMES.items() if name in names), None):
            value = getattr(importlib.import_module(home), name)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value


def _version() -> str:
    """The version in pyproject.toml: read from the file in a checkout, from the installed metadata elsewhere.

    A checkout comes first because the metadata of an editable install is as old as the last `pip install`.
    """
    import importlib.metadata
    import tomllib
    from pathlib import Path

    pyproject = Path(__file__).parents[1] / "pyproject.toml"
    if pyproject.is_file():
        project = tomllib.loads(pyproject.read_text(encoding="utf-8")).get("project", {})
        if project.get("name") == "vlmrl":
            return str(project["version"])
    return importlib.metadata.version("vlmrl")
