"""Make the tools of a run from its config."""

from __future__ import annotations

import re
from collections.abc import Mapping

from vlmrl.config.tool import ImportedTool, ToolConfig, ZoomTool
from vlmrl.errors import ConfigError
from vlmrl.tools.base import Tool
from vlmrl.tools.imported import Imported
from vlmrl.tools.zoom import Zoom


def load_tools(config: Mapping[str, ToolConfig]) -> tuple[Tool, ...]:
    """The tools of `tool`, in the order of the config. Raises `ConfigError` where one cannot be used.

    >>> [tool.spec.name for tool in load_tools({"zoom": ZoomTool()})]
    ['zoom']
    """
    return tuple(_tool(each, name) for name, each in config.items())


def _tool(config: ToolConfig, name: str) -> Tool:
    if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]{0,63}", name) is None:
        raise ConfigError(
            f"tool.{name} is no name that a policy can call: use letters, digits, dashes and underscores, 64 at most"
        )
    match config:
        case ZoomTool():
            return Zoom(config, name)
        case ImportedTool():
            return Imported.of(config, name, f"tool.{name}")
    raise AssertionError(f"no tool for {type(config).__name__}")
