"""What a task of your own needs; the contract is in `vlmrl.tasks.base`, its check is `python -m vlmrl.tasks.check`.

The names are imported when they are first asked for: a config knows `vlmrl.config.task` alone, and to refuse one takes
no numpy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlmrl.tasks.base import Env, Problem, Reply, Split, Task
    from vlmrl.tasks.loading import load_task
    from vlmrl.types import Image, Message, Text

__all__ = ["Env", "Image", "Message", "Problem", "Reply", "Split", "Task", "Text", "load_task"]

HOMES = {"vlmrl.types": ("Image", "Message", "Text"), "vlmrl.tasks.loading": ("load_task",)}
"""Module → what it has of `__all__`; the rest is in `vlmrl.tasks.base`."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = next((module for module, names in HOMES.items() if name in names), "vlmrl.tasks.base")
    return getattr(importlib.import_module(home), name)
