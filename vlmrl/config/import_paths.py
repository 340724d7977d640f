"""Import objects that the config names by an import path: a task's class, a reward, a loss, an advantage function.

    my_package.my_module:name    a module, as `import my_package.my_module` finds it
    path/to/file.py:name         a file, from any folder; the folder is searched last for what the file itself imports

The module of a file is named after its absolute path (`module_of_file`), so every process imports it under the same
name, and its objects can be pickled.

A wrong path is a `ConfigError` that names the key, and so is whatever the user's module raises while it is imported:
the message has the line. cli/main.py puts the current folder on `sys.path`, where modules are looked for.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from vlmrl.errors import ConfigError, UserFault, VlmrlError, fenced


def is_import_path(path: str) -> bool:
    """Whether a text has the form `package.module:name` or `path/to/file.py:name`. Nothing is imported.

    >>> [is_import_path(path) for path in ("my.losses:mine", "losses:mine", "mine", "my..losses:mine")]
    [True, True, False, False]
    >>> [is_import_path(path) for path in ("~/my losses.py:mine", "losses.py:mine", "losses.py", "a.py:b.c")]
    [True, True, False, False]
    """
    module, colon, name = path.rpartition(":")
    is_module = ":" not in module and all(part.isidentifier() for part in module.split("."))
    return bool(colon) and name.isidentifier() and (is_module or names_a_file(path))


def names_a_file(path: str) -> bool:
    """Whether an import path has the form `path/to/file.py:name`.

    >>> names_a_file("rewards.py:mine"), names_a_file("rewards:mine"), names_a_file("a/.py:mine")
    (True, False, False)
    """
    file, _, name = path.rpartition(":")
    return re.search(r"[^/]\.py$", file) is not None and "\0" not in file and name.isidentifier()


def absolute(path: str) -> str:
    """An import path whose file is found from any folder: relative ones start at the current folder, `~` is the home
    folder. Other texts stay as they are.

    >>> absolute("/a/../rewards.py:mine"), absolute("rewards:mine")
    ('/rewards.py:mine', 'rewards:mine')
    """
    if not names_a_file(path):
        return path
    file, _, name = path.rpartition(":")
    return f"{os.path.abspath(os.path.expanduser(file))}:{name}"


FILE_PREFIX = "file_"
"""The begin of the name of a module that is a file of the user's."""


def module_of_file(file: str) -> str:
    """The name of the module that a file is imported as; `file_of_module` is the way back.

    >>> module_of_file("/home/me/my-rewards.py")
    'file__shome_sme_smy_2dxrewards_ppy'
    """
    special = {"_": "__", "/": "_s", ".": "_p"}
    return FILE_PREFIX + re.sub(
        r"[^A-Za-z0-9]", lambda found: special.get(found[0], f"_{ord(found[0]):x}x"), os.path.abspath(file)
    )


def file_of_module(name: str) -> str:
    """
    >>> file_of_module(module_of_file("/tmp/a_b/日本 (1).py"))
    '/tmp/a_b/日本 (1).py'
    """
    special = {"_": "_", "s": "/", "p": "."}
    return re.sub(
        r"_(?:([_sp])|([0-9a-f]+)x)",
        lambda found: special[found[1]] if found[1] else chr(int(found[2], 16)),
        name.removeprefix(FILE_PREFIX),
    )


class FileFinder:
    """Finds modules that are files of the user's by their names, so that any process can import or unpickle them."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """What Python's import asks of an entry of `sys.meta_path`."""
        if not name.startswith(f"{FILE_PREFIX}_s") or path is not None:
            return None
        file = file_of_module(name)
        if not os.path.isfile(file):
            return None
        if (folder := os.path.dirname(file)) not in sys.path:
            sys.path.append(folder)  # last, so that nothing in it hides another module
        return importlib.util.spec_from_file_location(name, file)


sys.meta_path.append(FileFinder)


def import_named(
    key: str, path: str, kind: str, is_kind: Callable[[Any], bool], is_offered: Callable[[Any], bool] | None = None
) -> Any:
    """Import the object at `path`, the value of `key`. Raises ConfigError.

    `kind` says in words what it must be, and `is_kind` tells whether an object is one. An error suggests the objects of
    the module for which `is_offered` (default: `is_kind`) is true.

    >>> import_named("task.target", "counting", "Task class", callable)
    Traceback (most recent call last):
    vlmrl.errors.ConfigError: task.target=counting is not of the form package.module:Class or path/to/file.py:Class, \
so there is no Task class to load: write the import path of yours
    """
    if not is_import_path(path):
        form = "Class" if kind.endswith("class") else "function"
        raise ConfigError(
            f"{key}={path} is not of the form package.module:{form} or path/to/file.py:{form}, so there is no {kind} "
            "to load: write the import path of yours"
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
    module_name, _, attribute = path.rpartition(":")
    module = _import(key, path, module_name, kind)
    found = getattr(module, attribute, None)
    if found is None:
        place = module_name if names_a_file(path) else f"{module_name} ({module.__file__})"
        raise ConfigError(
            f"{key}={path} names {attribute!r}, which {place} does not define, so there is no {kind} to load: "
            f"{_offer(module, kind, is_offered or is_kind)}"
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
    if names_a_file(path):
        file, _, _ = absolute(path).rpartition(":")
        if not os.path.isfile(file):
            raise ConfigError(
                f"{key}={path} names the file {file}, which does not exist, so there is no {kind} to load: correct the "
                "path"
            )
        module_name = module_of_file(file)
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
