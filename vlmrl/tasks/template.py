"""Jinja templates of the user's, for prompts: `task.template` of a data set, `task.prompt` of an environment.

Templates run in Jinja's sandbox. A text without braces that is the path of a file stands for the file's content.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, TemplateSyntaxError, meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from vlmrl.errors import ConfigError, safe_text

_FILE_NAME = re.compile(r"[^\n{}]+\.(?:jinja2?|j2|txt|md)", re.IGNORECASE)


class Template:
    """A compiled template. Thread-safe."""

    def __init__(self, template: str, key: str) -> None:
        """`template`: inline, or the path of a file. `key` is its config key, for messages. Raises ConfigError."""
        self._source = _source_of(template, key)
        self.key = key
        environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
        try:
            self._tree = environment.parse(self._source)
            self._template = environment.from_string(self._source)
        except TemplateSyntaxError as error:
            raise ConfigError(
                f"{key} cannot be read as a Jinja template ({error.message}, line {error.lineno}: "
                f"{_line(self._source, error.lineno)!r}), so no prompt can be made: correct it"
            ) from None

    @property
    def names(self) -> frozenset[str]:
        """The variables that the template needs."""
        return frozenset(meta.find_undeclared_variables(self._tree)) - self._optional() - _GLOBALS

    def place_of(self, name: str) -> str:
        """Where the template uses a variable first: `line 1, character 4`."""
        line = min(node.lineno for node in self._tree.find_all(nodes.Name) if node.name == name)
        column = re.search(rf"\b{re.escape(name)}\b", _line(self._source, line))
        return f"line {line}, character {column.start() + 1}" if column is not None else f"line {line}"

    def fill(self, names: Mapping[str, Any]) -> str:
        """The text with these variables. Raises whatever the template raises; `line_of` tells where."""
        return self._template.render(names)

    def _optional(self) -> frozenset[str]:
        """Names that the template itself tests with `is defined` or fills by `default`."""
        tests = (node.node for node in self._tree.find_all(nodes.Test) if node.name in ("defined", "undefined"))
        filters = (node.node for node in self._tree.find_all(nodes.Filter) if node.name in ("default", "d"))
        return frozenset(node.name for node in (*tests, *filters) if isinstance(node, nodes.Name))


_GLOBALS = frozenset(ImmutableSandboxedEnvironment().globals)


def line_of(error: BaseException) -> int | None:
    """The line of the template in which it failed: Jinja gives its frames the name `<template>`."""
    step, line = error.__traceback__, None
    while step is not None:
        if step.tb_frame.f_code.co_filename == "<template>":
            line = step.tb_lineno
        step = step.tb_next
    return line


def _source_of(template: str, key: str) -> str:
    if "{{" in template or "{%" in template or "\n" in template:
        return template
    try:
        path = Path(template).expanduser()
        if path.is_file():
            return path.read_text(encoding="utf-8")
    except (OSError, ValueError, RuntimeError) as error:
        if _FILE_NAME.fullmatch(template):
            raise ConfigError(
                f"{key}={template} cannot be read ({safe_text(error)}), so no prompt can be made: correct the path"
            ) from None
    if _FILE_NAME.fullmatch(template) and " " not in template:
        raise ConfigError(f"{key}={template} is no file here, so no prompt can be made: correct the path")
    return template


def _line(source: str, number: int) -> str:
    lines = source.splitlines()
    return lines[number - 1] if 0 < number <= len(lines) else ""
