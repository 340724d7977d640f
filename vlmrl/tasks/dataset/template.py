"""`task.template`: the text of the user's message, made by Jinja from the columns of the row.

    task.template="{{ image }}{{ question }} Answer with one word."
    task.template=prompts/count.jinja                                  # a file

A template sees every column by its name (`columns["odd name"]` for names that are no identifiers), and `content`: the
text that the prompt would have without a template, as in EasyR1's `format_prompt` files. `{{ image }}` and
`{{ images }}` become the marker `<image>`, once per image, also where columns of these names hold bytes.

Templates run in Jinja's sandbox. A name that no row has is refused before the run, with its place; what fails for one
row costs that row.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, TemplateSyntaxError, meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from vlmrl.errors import ConfigError, safe_text
from vlmrl.tasks.dataset.columns import Unusable, nearest, plain
from vlmrl.tasks.dataset.conversation import MARKER

CONTENT = "content"
"""The name of the text without a template."""

LONGEST_PROMPT = 1 << 22
"""Characters that a template may make."""

_FILE_NAME = re.compile(r"[^\n{}]+\.(?:jinja2?|j2|txt|md)", re.IGNORECASE)


class Markers(list[str]):
    """The markers of a row's images: a list for templates that loop, and a text for those that print it."""

    def __str__(self) -> str:
        return "".join(self)

    def __html__(self) -> str:
        return str(self)


class PromptTemplate:
    """A compiled template. Thread-safe."""

    def __init__(self, template: str, key: str) -> None:
        """`template`: inline, or the path of a file. `key` is its config key, for messages. Raises ConfigError."""
        self._source = _source_of(template, key)
        self._key = key
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

    def check(self, known: Sequence[str]) -> None:
        """Raise ConfigError where the template needs a name that is no column."""
        for name in sorted(self.names):
            if name not in (*known, CONTENT, "image", "images", "columns"):
                line = min(node.lineno for node in self._tree.find_all(nodes.Name) if node.name == name)
                column = re.search(rf"\b{re.escape(name)}\b", _line(self._source, line))
                place = f"line {line}, character {column.start() + 1}" if column is not None else f"line {line}"
                raise ConfigError(
                    f"{self._key} uses {name} ({place}), which is no column, so no prompt can be made: "
                    f"{nearest(name, known)}"
                )

    def render(self, row: Mapping[str, Any], content: str, images: int, image_columns: Sequence[str]) -> str:
        """The text of one row. Raises `Unusable`."""
        markers = Markers([MARKER] * images)
        values = {name: plain(value) for name, value in row.items()}
        names = {CONTENT: content, "image": markers, "images": markers, **values}
        names |= {
            name: markers for name in ("image", "images", *image_columns) if name in image_columns or name not in row
        }
        try:
            made = self._template.render(names, columns=names)
        except Exception as error:  # noqa: BLE001 — the template is the user's code
            line = _line_of(error)
            place = f" in line {line}" if line is not None else ""
            raise Unusable(
                f"{self._key} fails for this row{place} ({type(error).__name__}: {safe_text(error)}): correct the "
                "template, or the columns that it uses"
            ) from None
        if len(made) > LONGEST_PROMPT:
            raise Unusable(f"{self._key} makes {len(made)} characters of this row, too many for a prompt")
        return made

    def _optional(self) -> frozenset[str]:
        """Names that the template itself tests with `is defined` or fills by `default`."""
        tests = (node.node for node in self._tree.find_all(nodes.Test) if node.name in ("defined", "undefined"))
        filters = (node.node for node in self._tree.find_all(nodes.Filter) if node.name in ("default", "d"))
        return frozenset(node.name for node in (*tests, *filters) if isinstance(node, nodes.Name))


_GLOBALS = frozenset(ImmutableSandboxedEnvironment().globals)


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


def _line_of(error: BaseException) -> int | None:
    """The line of the template in which it failed: Jinja gives its frames the name `<template>`."""
    step, line = error.__traceback__, None
    while step is not None:
        if step.tb_frame.f_code.co_filename == "<template>":
            line = step.tb_lineno
        step = step.tb_next
    return line
