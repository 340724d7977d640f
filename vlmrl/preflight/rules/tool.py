"""Tools: a call leaves a turn for the answer, and there are images to work on."""

from __future__ import annotations

from vlmrl.config.dataset import DatasetConfig
from vlmrl.config.run import BY_REWARD, Mode, RunConfig
from vlmrl.config.small_print import SmallPrintConfig
from vlmrl.config.task import MixtureConfig, tasks_of
from vlmrl.config.tool import Coordinates, ZoomTool
from vlmrl.errors import ConfigError
from vlmrl.preflight.rules.reward import all_tasks
from vlmrl.preflight.site import Site

PLAYING = (*BY_REWARD, Mode.eval, Mode.play, Mode.doctor)
"""Modes in which tools are called."""

LEAST_TURNS = 2
"""One that calls a tool, and one that answers."""


def calls_leave_a_turn(config: RunConfig) -> None:
    """With tools an episode has a turn after a call; without them, a row of a data set has one turn."""
    for key, whole in all_tasks(config).items():
        for own_key, own in tasks_of(whole, key).items():
            if isinstance(own, MixtureConfig):
                continue
            if config.tool and own.max_turns < LEAST_TURNS and config.mode in PLAYING:
                raise ConfigError(
                    f"{own_key}.max_turns={own.max_turns} leaves no turn for the answer after a call of "
                    f"tool=[{','.join(config.tool)}], so no answer that used a tool could be scored: set "
                    f"{own_key}.max_turns=4 (three calls and the answer), or tool=[]"
                )
            if own.kind == DatasetConfig.kind and not config.tool and own.max_turns > 1:
                raise ConfigError(
                    f"{own_key}.max_turns={own.max_turns} has no effect without tools, because a row has one prompt "
                    f"and one answer, so no turn follows: set {own_key}.max_turns=1, or choose tool=[zoom]"
                )


def demonstrated_calls_exist(config: RunConfig) -> None:
    """The calls in the demonstrations of task=small_print are calls of a tool that the run has."""
    zoom = config.tool.get("zoom")
    fits = isinstance(zoom, ZoomTool) and zoom.coordinates is Coordinates.thousandths
    for key, task in tasks_of(config.task).items():
        if isinstance(task, SmallPrintConfig) and task.demonstrated_zooms and not fits:
            raise ConfigError(
                f"{key}.demonstrated_zooms={task.demonstrated_zooms} shows calls of zoom in thousandths, and "
                f"tool=[{','.join(config.tool)}] has no such tool, so supervised steps would teach calls that fail: "
                f"choose tool=[zoom], or set {key}.demonstrated_zooms=0"
            )


def tools_have_images(config: RunConfig, site: Site) -> None:
    """A model that is to enlarge images takes images."""
    if config.model.vlm is not None or config.mode not in PLAYING:
        return
    for name, tool in config.tool.items():
        if isinstance(tool, ZoomTool):
            raise ConfigError(
                f"tool.{name}.kind=zoom cuts images, and model.name={config.model.name} is a text-only model "
                "(model.vlm=null), so every call would fail: leave it out, or choose a model with images"
            )
