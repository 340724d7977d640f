"""From `task.target` to a Task. Every way in which the path can be wrong is a `ConfigError` that names the key.

What the user's module raises while it is imported, or its class while it is made, is left as it is: the traceback
points at their line. `sys.path` is left alone too: `python -m vlmrl` finds modules in the folder it is started from.
"""

from __future__ import annotations

import importlib
import inspect
from types import ModuleType
from typing import cast

from vlmrl.errors import ConfigError
from vlmrl.tasks.base import Task
from vlmrl.tasks.config import TaskConfig

METHODS = ("problem", "env", "demonstration", "texts")


def load_task(config: TaskConfig, *, seed: int) -> Task:
    """Import the class that `config.target` names and call it as `Class(config, seed=seed)`.

    Raises `ConfigError` when there is no such module or attribute, or when it is no Task.

    >>> from vlmrl.tasks.config import ColorCodewordConfig
    >>> load_task(ColorCodewordConfig(), seed=0).problem("eval", 0).id
    'EBGH'
    >>> load_task(TaskConfig("counting"), seed=0)  # doctest: +NORMALIZE_WHITESPACE
    Traceback (most recent call last):
    vlmrl.errors.ConfigError: task.target=counting is not of the form package.module:Class, so there is no task
     to load: write the import path of your Task class
    """
    module_name, colon, attribute = config.target.partition(":")
    if not (colon and attribute.isidentifier() and all(part.isidentifier() for part in module_name.split("."))):
        raise ConfigError(
            f"task.target={config.target} is not of the form package.module:Class, so there is no task to load: "
            "write the import path of your Task class"
        )
    module = _import(module_name, config.target)
    task_class = getattr(module, attribute, None)
    if task_class is None:
        raise ConfigError(
            f"task.target={config.target} names {attribute!r}, which {module_name} ({module.__file__}) does not "
            f"define, so there is no task to load: {_offer(module)}"
        )
    if not isinstance(task_class, type):
        raise ConfigError(
            f"task.target={config.target} is a {type(task_class).__name__}, not a Task class, so it makes no "
            f"problems: {_offer(module)}"
        )
    if missing := missing_methods(task_class):
        raise ConfigError(
            f"task.target={config.target} is not a Task, for it does not define {', '.join(missing)}, so a run would "
            f"stop at its first problem: define what vlmrl.tasks.base.Task lists"
        )
    try:
        inspect.signature(task_class).bind(config, seed=seed)
    except TypeError as error:
        raise ConfigError(
            f"task.target={config.target} cannot be called as {attribute}(config, seed=…) ({error}), so it is not a "
            "Task: give it `def __init__(self, config, *, seed)`"
        ) from error
    return cast("Task", task_class(config, seed=seed))


def missing_methods(task_class: type) -> list[str]:
    """Methods of the protocol that a class neither defines nor may leave out.

    A class that derives from `Task` inherits the protocol's empty bodies, which would answer None: those count as
    missing. The inherited `demonstration` raises, as it should.
    """
    return [
        name
        for name in METHODS
        if not callable(getattr(task_class, name, None))
        or (name != "demonstration" and getattr(task_class, name) is getattr(Task, name))
    ]


def _import(module_name: str, target: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise ConfigError(
                f"task.target={target} names a module that does not exist ({error}), so there is no task to load: "
                f"correct it, or start from the folder that holds {module_name.partition('.')[0]} or add that folder "
                "to PYTHONPATH"
            ) from error
        raise ConfigError(
            f"task.target={target} does not import ({error}), so there is no task to load: install {error.name!r} or "
            f"mend the import in {module_name}"
        ) from error


def _offer(module: ModuleType) -> str:
    """The remedy: what the module could have been meant to give."""
    classes = [
        name
        for name, value in vars(module).items()
        if isinstance(value, type) and value.__module__ == module.__name__ and not missing_methods(value)
    ]
    return f"it has {', '.join(classes)}" if classes else "define a class there that has the methods of a Task"
