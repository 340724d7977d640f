"""Tasks: where their envs run; color_codeword's images, answers and rewards fit the model and the lengths."""

from __future__ import annotations

import math

from vlmrl.config.clip_direction import ClipDirectionConfig
from vlmrl.config.gymnasium import GymnasiumConfig
from vlmrl.config.reward import RewardConfig
from vlmrl.config.run import LEARN, Mode, RunConfig
from vlmrl.config.small_print import SmallPrintConfig
from vlmrl.config.task import ColorCodewordConfig, Workers, tasks_of
from vlmrl.errors import ConfigError
from vlmrl.models.families import family_of
from vlmrl.preflight.estimate.sizes import TURN_FRAME
from vlmrl.preflight.rules.reward import all_tasks
from vlmrl.preflight.site import Site

PLAYING = (*LEARN, Mode.eval, Mode.doctor, Mode.bench)
"""Modes that show a task's problems to the model."""


def workers_are_processes(config: RunConfig) -> None:
    """A number of workers belongs to worker processes."""
    for key, whole in all_tasks(config).items():
        for own_key, own in tasks_of(whole, key).items():
            if own.num_workers is not None and own.workers is Workers.thread:
                raise ConfigError(
                    f"{own_key}.num_workers={own.num_workers} has no effect with {own_key}.workers=thread, so the envs "
                    f"would run in threads of the run: set {own_key}.workers=process, or leave {own_key}.num_workers "
                    "out"
                )


def squares_fill_tokens(config: RunConfig) -> None:
    """A square covers whole image tokens, so the image processor does not rescale it."""
    family = family_of(config.model.vlm)
    side = family.token_pixels
    for key, task in tasks_of(config.task).items():
        if not isinstance(task, ColorCodewordConfig) or side is None or task.image_size % side == 0:
            continue
        raise ConfigError(
            f"{key}.image_size={task.image_size} is not a multiple of {side}, the pixels per side of an image token, "
            f"so the image processor of model.vlm.family={family.name} would rescale the squares: set "
            f"{key}.image_size={max(1, round(task.image_size / side)) * side}"
        )


def images_are_seen(config: RunConfig, site: Site) -> None:
    """A model that is shown images takes images."""
    if config.model.vlm is not None or config.mode not in PLAYING:
        return
    for key, task in tasks_of(config.task).items():
        if isinstance(task, ColorCodewordConfig | ClipDirectionConfig | GymnasiumConfig | SmallPrintConfig):
            raise ConfigError(
                f"{key}.kind={task.kind} shows images, and model.name={config.model.name} is a text-only model "
                "(model.vlm=null), so every rollout would fail: choose a task of texts, such as task=dataset "
                "task.path=<rows>, or a model with images"
            )


def answer_fits(config: RunConfig) -> None:
    """The longest answer, one token per letter and one that ends the turn, fits in a completion."""
    longest = config.orchestrator.max_new_tokens
    for key, task in tasks_of(config.task).items():
        letters = task.max_turns * task.images_per_turn if isinstance(task, ColorCodewordConfig) else 0
        if letters == 0 or longest > letters:
            continue
        raise ConfigError(
            f"orchestrator.max_new_tokens={longest} is too short for a codeword of {key}.max_turns * "
            f"{key}.images_per_turn = {letters} letters, so the last answer would be cut before its end: set "
            f"orchestrator.max_new_tokens={letters + 1} or more"
        )


def episode_has_room(config: RunConfig) -> None:
    """The last turn can be reached. Counts the images, and one token for each answer."""
    for key, task in tasks_of(config.task).items():
        if isinstance(task, ColorCodewordConfig):
            _refuse_long_episode(config, task, key)


def _refuse_long_episode(config: RunConfig, task: ColorCodewordConfig, key: str) -> None:
    family = family_of(config.model.vlm)
    bounds = family.image_bounds(config.model)
    if bounds is None:
        return
    image = family.image_tokens(task.image_size, task.image_size, bounds)
    images = task.max_turns * task.images_per_turn
    least = images * (image + family.frame_tokens) + task.max_turns * (1 + TURN_FRAME)
    if least > config.trainer.seq_len:
        raise ConfigError(
            f"trainer.seq_len={config.trainer.seq_len} is too short for {key}.max_turns={task.max_turns} × "
            f"{key}.images_per_turn={task.images_per_turn} images of {image} tokens each "
            f"({key}.image_size={task.image_size}), which take at least {least} tokens, so no episode would reach its "
            f"last turn: set trainer.seq_len={2 ** math.ceil(math.log2(least + 1))}, or fewer or smaller images"
        )


def target_is_a_reward(config: RunConfig) -> None:
    """The target lies among the rewards of the task."""
    target = config.orchestrator.eval.target
    is_scored_by_itself = isinstance(config.task, ColorCodewordConfig) and config.reward == RewardConfig()
    if is_scored_by_itself and target is not None and not 0 <= target <= 1:
        end = "met before anything is learned" if target < 0 else "never met"
        raise ConfigError(
            f"orchestrator.eval.target={target} is outside the rewards of task=color_codeword, from 0 to 1, so it "
            f"would be {end}: set orchestrator.eval.target=0.95, or null for all steps"
        )
