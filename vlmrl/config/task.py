"""`task`: what is learned. Each built-in task has its own schema; `task.target` may name a user's class."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass
class TaskConfig:
    """What every task has."""

    target: str = MISSING
    """Import path of the Task class, `package.module:Class`; called as `Class(config, seed=run seed)`."""
    max_turns: int = 1
    """Turns of an episode: prompt, completion, reply."""
    num_examples: int | None = None
    """Training problems: the first so many, over and over, supervised steps included. None: as many as the task has."""


@dataclass
class ColorCodewordConfig(TaskConfig):
    """Colours to letters: read the squares, answer with the codeword so far."""

    target: str = "vlmrl.tasks.color_codeword:ColorCodeword"
    """The built-in class."""
    max_turns: int = 2
    """User turns; the codeword has `max_turns * images_per_turn` letters."""
    images_per_turn: int = 2
    """Squares that each user turn shows."""
    image_size: int = 32
    """Pixels per side of a square."""
    shuffle_images: bool = False
    """Control: show the images of another problem. Nothing can be learned then."""
    holdout_one_in: int = 8
    """Codewords of which one, chosen by its hash, is kept for evaluation and never trained on."""


@dataclass
class ImportedTaskConfig(TaskConfig):
    """A task of the user's own: `task=my_package.my_module:MyTask task.args.level=3`."""

    args: dict[str, Any] = field(default_factory=dict)
    """Whatever the task reads; not checked here."""
