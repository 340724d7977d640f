"""The task can be found, and what it asks fits into an answer."""

from __future__ import annotations

import math

from vlmrl.config.import_paths import is_import_path
from vlmrl.config.run import RunConfig
from vlmrl.config.task import ColorCodewordConfig
from vlmrl.errors import ConfigError
from vlmrl.models.families import family_of
from vlmrl.preflight.estimate.vision import TURN_FRAME


def task_has_class(config: RunConfig) -> None:
    """`task.target` can be an import path."""
    if not is_import_path(config.task.target):
        raise ConfigError(
            f"task.target={config.task.target} requires the form package.module:Class, else no class can be imported: "
            "set task=my_package.my_module:MyTask"
        )


def squares_fill_patches(config: RunConfig) -> None:
    """color_codeword: a square is whole image tokens, and an answer fits in its completion."""
    task, family = config.task, family_of(config.model.vlm)
    if not isinstance(task, ColorCodewordConfig):
        return
    side = family.token_pixels
    if side is not None and task.image_size % side != 0:
        raise ConfigError(
            f"task.image_size={task.image_size} requires a multiple of {side}, else the processor "
            f"of model.vlm.family={family.name} rescales the squares (its tokens are {side} pixels wide): "
            f"set task.image_size={max(1, round(task.image_size / side)) * side}"
        )
    letters = task.max_turns * task.images_per_turn
    if config.orchestrator.max_new_tokens < letters + 1:
        raise ConfigError(
            f"orchestrator.max_new_tokens={config.orchestrator.max_new_tokens} requires a codeword of fewer letters "
            f"than task.max_turns * task.images_per_turn = {letters}, else the last answer is cut before its end: "
            f"set orchestrator.max_new_tokens={letters + 1} or more"
        )


def episode_has_room(config: RunConfig) -> None:
    """color_codeword: the last turn can be reached. Images alone, and one token for each answer."""
    task, family = config.task, family_of(config.model.vlm)
    bounds = family.image_bounds(config.model)
    if not isinstance(task, ColorCodewordConfig) or bounds is None:
        return
    image = family.image_tokens(task.image_size, task.image_size, bounds)
    images = task.max_turns * task.images_per_turn
    least = images * (image + family.frame_tokens) + task.max_turns * (1 + TURN_FRAME)
    if least > config.trainer.seq_len:
        raise ConfigError(
            f"trainer.seq_len={config.trainer.seq_len} requires less than task.max_turns={task.max_turns} × "
            f"task.images_per_turn={task.images_per_turn} images ({image} tokens each with "
            f"task.image_size={task.image_size}), else no episode reaches its last turn: it takes at least {least} "
            f"tokens. Set trainer.seq_len={2 ** math.ceil(math.log2(least + 1))}, or fewer or smaller images"
        )
