"""Load the class that `task.target` names and make the task of a run.

A wrong path raises a ConfigError that names the key, and so does whatever the user's class raises; a VlmrlError of its
own passes.
"""

from __future__ import annotations

import inspect
from typing import Any, cast

from vlmrl.config.import_paths import import_named, user_code
from vlmrl.config.model import Init, ModelConfig
from vlmrl.config.task import TaskConfig
from vlmrl.errors import ConfigError, UserFault, fenced
from vlmrl.tasks.base import HasDataTable, HasVideos, Split, Task
from vlmrl.tasks.border import TaskCodeError, checked_texts, get_num_rows
from vlmrl.types import Message

REQUIRED = ("problem", "env", "demonstration")
"""What every task has; `texts` is needed only for a tokenizer that is made here."""


def load_task(config: TaskConfig, *, seed: int) -> Task:
    """Import the class that `config.target` names and call it as `Class(config, seed=seed)`.

    With `config.num_examples` the task has that many training problems. Raises ConfigError if there is no such module
    or attribute, if it is not a Task, or if its `__init__` raises.

    >>> from vlmrl.config.task import ColorCodewordConfig
    >>> load_task(ColorCodewordConfig(), seed=0).problem("eval", 0).id
    'EBGH'
    >>> few = load_task(ColorCodewordConfig(num_examples=100), seed=0)
    >>> few.problem("train", 0).id == few.problem("train", 100).id == few.problem("train", 2**40 + 24).id
    True
    """
    task_class = find_task(config)
    with user_code("task.target", config.target, f"{task_class.__name__}(config, seed={seed})", "task"):
        task = cast("Task", task_class(config, seed=seed))
    return task if config.num_examples is None else FirstExamples(task, config.num_examples)


def find_task(config: TaskConfig) -> Any:
    """Import the class that `config.target` names without calling it. Raises ConfigError as `load_task` does."""
    task_class = import_named("task.target", config.target, "Task class", _is_class, _is_task)
    name = task_class.__name__
    if missing := missing_methods(task_class):
        raise ConfigError(
            f"task.target={config.target} does not define {', '.join(missing)}, so a run would stop at its first "
            "problem: define the methods of vlmrl.Task"
        )
    try:
        inspect.signature(task_class).bind(config, seed=0)
    except TypeError as error:
        raise ConfigError(
            f"task.target={config.target} cannot be called as {name}(config, seed=…) ({error}), so no run can make the "
            "task: define `def __init__(self, config, *, seed)`"
        ) from error
    return task_class


def _is_class(found: object) -> bool:
    return isinstance(found, type)


def _is_task(found: object) -> bool:
    return isinstance(found, type) and not missing_methods(found)


class FirstExamples(Task):
    """A task with only the first `count` training problems of another one, repeated."""

    def __init__(self, task: Task, count: int) -> None:
        self._task = task
        self._count = count

    def problem(self, split: Split, index: int) -> Any:
        return self._task.problem(split, index % self._count if split == "train" else index)

    def num_rows(self, split: Split) -> int | None:
        rows = get_num_rows(self._task, split)
        return rows if split == "eval" else min(self._count, rows or self._count)

    def env(self, problem: Any) -> Any:
        return self._task.env(problem)

    def demonstration(self, problem: Any, *, random_answers: bool, seed: int) -> tuple[Message, ...]:
        return self._task.demonstration(problem, random_answers=random_answers, seed=seed)

    def texts(self) -> tuple[str, ...]:
        return texts_of(self._task)

    def data_table(self) -> dict[str, str]:
        return data_table_of(self._task)

    def shows_videos(self) -> bool:
        return shows_videos(self._task)


def data_table_of(task: Task) -> dict[str, str]:
    """What the task has read, one line per fact; empty where it does not tell."""
    return task.data_table() if isinstance(task, HasDataTable) else {}


def shows_videos(task: Task) -> bool:
    """Whether a task is known to have rows that show videos."""
    return isinstance(task, HasVideos) and task.shows_videos()


def missing_methods(task_class: type) -> list[str]:
    """The required methods that a class does not define.

    A class that derives from `Task` inherits the protocol's empty methods. They would return None, so they count as
    missing. Only the inherited `demonstration` may stay, because it raises NotImplementedError.
    """
    return [
        name
        for name in REQUIRED
        if not callable(getattr(task_class, name, None))
        or (name != "demonstration" and getattr(task_class, name) is getattr(Task, name))
    ]


def tokenizer_texts(model: ModelConfig, task: Task) -> tuple[str, ...]:
    """The texts that a tokenizer is trained on; () where the model comes with one.

    Raises ConfigError where they are needed and `task.texts` does not give them.
    """
    if model.tiny is None and model.init is not Init.random:
        return ()
    try:
        return texts_of(task)
    except UserFault as fault:
        raise ConfigError(
            f"{fault.text}, so no tokenizer can be made for model.name={model.name}: define texts() to return a tuple "
            "of str, e.g. (system_prompt, question), or choose a model that comes with a tokenizer (model=qwen3vl)"
        ) from fault


def texts_of(task: Task) -> tuple[str, ...]:
    """`task.texts`, as plain texts. Raises `UserFault`."""
    with fenced("texts()", TaskCodeError):
        texts: Any = getattr(task, "texts", None)
        if texts is None or getattr(type(task), "texts", None) is Task.texts:
            raise TaskCodeError(f"{type(task).__name__} does not define texts()")
        return checked_texts(texts())
