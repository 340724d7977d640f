"""`task=small_print`: a question whose answer can be read only after a zoom."""

from __future__ import annotations

from dataclasses import dataclass

from vlmrl.config.fields import Resume, setting
from vlmrl.config.task import TaskConfig


@dataclass
class SmallPrintConfig(TaskConfig):
    """Read a print that is too small at the resolution of the first view: `task=small_print tool=[zoom]`."""

    kind: str = setting("small_print", on_resume=Resume.refused)
    """The built-in task."""
    target: str = setting("vlmrl.tasks.small_print:SmallPrint", on_resume=Resume.refused, imports=True)
    """The built-in class."""
    max_turns: int = setting(3, on_resume=Resume.noted, low=1, high=10**5, outside="an episode has no turn")
    """The most turns of an episode: calls of tools, and the answer."""
    places: int = setting(4, on_resume=Resume.refused, low=1, high=4, outside="an image has four quarters")
    """Number of positions of the print, the middles of the image's quarters: with 1 it is always in the upper left one.
    A dark frame, which the first view shows, is drawn around its quarter."""
    demonstrated_zooms: int = setting(
        0, on_resume=Resume.noted, low=0, high=2, outside="the print is readable after one or two zooms"
    )
    """How many times a demonstration calls `zoom` before it answers: 1 zooms into the print, 2 into its quarter first.
    0 is for runs without `tool=[zoom]`."""
    invalid_reward: float = setting(0.0, on_resume=Resume.noted, low=-1e9, high=1e9, outside="it is no reward")
    """Reward of an answer that is not one of the four letters."""
