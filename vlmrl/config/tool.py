"""`tool`: what a policy may call before it answers. A run has any number of tools, each under a name of its own.

    tool:
      zoom:  {kind: zoom, size: 448}
      count: {kind: imported, target: my_module:count}

The name of an entry is the name of the tool in the prompt. Each kind has a schema of its own (`TOOLS`); its code is in
the file of that name in vlmrl/tools/.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from omegaconf import MISSING

from vlmrl.config.fields import PROSE, SMALLEST, Resume, setting


@dataclass
class ToolConfig:
    """What every tool has."""

    timeout_s: float = setting(
        30.0, on_resume=Resume.noted, low=SMALLEST, high=1e6, outside="no call could return in that time"
    )
    """Seconds that a call may take. A call that takes longer gets a reply that says so and counts in `tools/errors`;
    the rollout goes on."""
    description: str | None = setting(None, on_resume=Resume.refused, form=PROSE)
    """What the prompt says about the tool. None: the tool's own words, for a function of yours its docstring."""
    kind: str = setting(MISSING, on_resume=Resume.refused)
    """The tool's schema; set by the option that `tool=` chooses."""


class Coordinates(Enum):
    """How a call gives a place in an image."""

    thousandths = "thousandths"
    """Whole numbers from 0 to 1000, as shares of the width and of the height; Qwen3-VL and Gemma use these."""
    pixels = "pixels"
    """Pixels of the image as the task gave it."""
    fractions = "fractions"
    """Numbers from 0 to 1."""


@dataclass
class ZoomTool(ToolConfig):
    """Cut a box out of an image that was shown, and show it enlarged."""

    kind: str = setting("zoom", on_resume=Resume.refused)
    """Crop and enlarge."""
    coordinates: Coordinates = setting(Coordinates.thousandths, on_resume=Resume.refused)
    """How a call gives the box."""
    size: int | None = setting(
        None, on_resume=Resume.noted, low=8, high=8192, outside="no processor takes an image of that size"
    )
    """Pixels of the longer side of the result. None: those of the image that the box is cut from. The part is cut from
    the image as the task gave it, not from what `model.vlm.max_pixels` made of it, so a zoom shows more detail."""


@dataclass
class ImportedTool(ToolConfig):
    """A function of your own, `tool=[my_module:fn]`. Its type hints and docstring describe it to the policy."""

    kind: str = setting("imported", on_resume=Resume.refused)
    """A function by its import path."""
    target: str = setting(MISSING, on_resume=Resume.refused, imports=True)
    """Import path of the function, `package.module:function` or `path/to/file.py:function`. It may be `async`, and
    returns a text, a number, an image (`vlmrl.Image`, a PIL image, a uint8 array [H, W, 3]) or a list of these. A
    parameter that is an image is the number of an image in the call."""
    args: dict[str, Any] = setting({}, on_resume=Resume.noted, free_form=True)
    """Arguments that every call gets and that the policy does not see, `tool.fn.args.level=3`."""


TOOLS: dict[str, type[ToolConfig]] = {"zoom": ZoomTool, "imported": ImportedTool}
"""`kind` of a tool → its schema."""
