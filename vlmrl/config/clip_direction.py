"""`task=clip_direction`: a question about a clip that no single frame answers."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from vlmrl.config.algorithm import Credit
from vlmrl.config.fields import Resume, setting
from vlmrl.config.task import TaskConfig


class Frames(Enum):
    """Which frames of its clip a problem shows."""

    all = "all"
    """All of them, in order."""
    shuffled = "shuffled"
    """Blind control: all of them in another order, at the same times. Neither the way nor the first color is left."""
    first = "first"
    """Blind control: the first one, as often as the clip has frames."""


@dataclass
class ClipDirectionConfig(TaskConfig):
    """See which way a square moves in a clip, and which color it had first."""

    kind: str = setting("clip_direction", on_resume=Resume.refused)
    """The built-in task."""
    target: str = setting("vlmrl.tasks.clip_direction:ClipDirection", on_resume=Resume.refused, imports=True)
    """The built-in class."""
    max_turns: int = setting(2, on_resume=Resume.noted, low=2, high=2, outside="an episode has two questions")
    """Turns of an episode: two questions about one clip."""
    credit: Credit = setting(Credit.turn, on_resume=Resume.noted)
    """Each answer has a reward of its own."""
    clip_size: int = setting(32, on_resume=Resume.refused, low=16, high=2**11, outside="a frame shows no square")
    """Pixels per side of a frame."""
    colors: int = setting(4, on_resume=Resume.refused, low=2, high=4, outside="there are four colors")
    """Number of colors that squares have; each clip shows two."""
    frames: Frames = setting(Frames.all, on_resume=Resume.refused)
    """Which frames of its clip a problem shows."""
    holdout_one_in: int = setting(8, on_resume=Resume.refused, low=2, high=64, outside="no clip is left to train on")
    """One of so many problems, chosen by its hash, is kept for evaluation and never trained on."""
