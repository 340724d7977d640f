"""Import objects that the config names by an import path: a task's class, a loss, an advantage function.

A wrong path is a `ConfigError` that names the key, and so is whatever the user's module raises while it is imported:
the message has the line. cli/main.py puts the current folder on `sys.path`, where modules are looked for.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from vlmrl.errors import ConfigError, UserFault, VlmrlError, fenced


def is_import_path(path: str) -> bool:
    """Whether a text has the form `package.module:name`. Nothing is imported.

    >>> [is_import_path(path) for path in ("my.losses:mine", "losses:mine", "mine", "my..losses:mine")]
    [True, True, False, False]
    """
    module, colon, name = path.partition(":")
    return bool(colon) and name.isidentifier() and all(part.isidentifier() for part in module.split("."))


def import_named(
    key: str, path: str, kind: str, is_kind: Callable[[Any], bool], is_offered: Callable[[Any], bool] | None = None
) -> Any:
    """Import the object at `path`, the value of `key`. Raises ConfigError.

    `kind` says in words what it must be, and `is_kind` tells whether an object is one. An error suggests the objects of
    the module for which `is_offered` (default: `is_kind`) is true.

    >>> import_named("task.target", "counting", "Task class", callable)
    Traceback (most recent call last):
    vlmrl.errors.ConfigError: task.target=counting is not of the form package.module:Class, so there is no Task class \
to load: write the import path of yours
    """
    if not is_import_path(path):
        form = "Class" if kind.endswith("class") else "function"
        raise ConfigError(
            f"{key}={path} is not of the form package.module:{form}, so there is no {kind} to load: write the import "
            "path of yours"
        )
    with user_code(key, path, f"importing {path}", kind):
        return _found(key, path, kind, is_kind, is_offered)


@contextmanager
def user_code(key: str, path: str, doing: str, kind: str) -> Iterator[None]:
    """Turn what the user's code at `path`, the value of `key`, raises in the block into a ConfigError, also SystemExit.

    A `VlmrlError` passes: the user's own refusal, in their words. Ctrl-C passes, too.
    """
    own = None
    try:
        with fenced(doing):
            try:
                yield
            except VlmrlError as error:
                own = error
    except UserFault as fault:
        raise ConfigError(
            f"{key}={path}: {fault.text}, so there is no {kind} to use: correct that line, or what it is given"
        ) from None
    if own is not None:
        raise own


def _found(
    key: str, path: str, kind: str, is_kind: Callable[[Any], bool], is_offered: Callable[[Any], bool] | None
) -> Any:
    module_name, _, attribute = path.partition(":")
    module = _import(key, path, module_name, kind)
    found = getattr(module, attribute, None)
    if found is None:
        raise ConfigError(
            f"{key}={path} names {attribute!r}, which {module_name} ({module.__file__}) does not define, so there is "
            f"no {kind} to load: {_offer(module, kind, is_offered or is_kind)}"
        )
    if not is_kind(found):
        raise ConfigError(
            f"{key}={path} is a {type(found).__name__}, not a {kind}, so it cannot stand in for one: "
            f"{_offer(module, kind, is_offered or is_kind)}"
        )
    return found


def assert_takes(key: str, path: str, function: Callable[..., Any], *arguments: str) -> None:
    """Raise `ConfigError` where `function` does not accept these arguments by position.

    >>> assert_takes("algorithm.loss", "my.losses:mine", lambda tokens: None, "tokens", "totals", "config")
    Traceback (most recent call last):
    vlmrl.errors.ConfigError: algorithm.loss=my.losses:mine cannot be called as mine(tokens, totals, config) \
(too many positional arguments), so no step can use it: give it these arguments
    """
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError as error:
        call = f"{path.rpartition(':')[2]}({', '.join(arguments)})"
        raise ConfigError(
            f"{key}={path} cannot be called as {call} ({error}), so no step can use it: give it these arguments"
        ) from error


def _import(key: str, path: str, module_name: str, kind: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise ConfigError(
                f"{key}={path} names a module that does not exist ({error}), so there is no {kind} to load: "
                f"correct it, or start from the folder that holds {module_name.partition('.')[0]} or add that folder "
                "to PYTHONPATH"
            ) from error
        raise ConfigError(
            f"{key}={path} does not import ({error}), so there is no {kind} to load: install {error.name!r} or "
            f"fix the import in {module_name}"
        ) from error


def _offer(module: ModuleType, kind: str, is_offered: Callable[[Any], bool]) -> str:
    """The remedy: the objects of the module that could have been meant."""
    own = [
        name
        for name, value in vars(module).items()
        if getattr(value, "__module__", None) == module.__name__ and is_offered(value)
    ]
    return f"it has {', '.join(own)}" if own else f"define a {kind} there"
