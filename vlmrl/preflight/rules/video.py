"""Tasks with videos have a model that takes them, a renderer that makes them, and the packages that read them.

The columns of a data set are known when it is opened, so `rows_are_shown` is called with the loaded task, before the
model is loaded. A column that `task.columns.videos` names is known before, and so are the videos of
task=clip_direction: `videos_are_shown`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmrl.config.clip_direction import ClipDirectionConfig
from vlmrl.config.dataset import DatasetConfig
from vlmrl.config.gymnasium import GymnasiumConfig
from vlmrl.config.orchestrator import TEMPLATE
from vlmrl.config.program import ProgramConfig
from vlmrl.config.run import RunConfig
from vlmrl.config.task import tasks_of
from vlmrl.errors import ConfigError
from vlmrl.preflight.installed import Need, is_installed, pip_line
from vlmrl.preflight.rules.task import PLAYING

if TYPE_CHECKING:  # numpy alone takes a tenth of the half second that a refusal may take
    from vlmrl.tasks.base import Task


def videos_are_shown(config: RunConfig) -> None:
    """Videos that a task is known to show before it is loaded can be shown."""
    if config.mode not in PLAYING:
        return
    for key, task in tasks_of(config.task).items():
        if isinstance(task, DatasetConfig) and not isinstance(task, ProgramConfig) and task.columns.videos:
            _refuse(config, f"{key}.columns.videos={task.columns.videos} shows videos")
        if isinstance(task, GymnasiumConfig) and task.film:
            _refuse(config, f"{key}.film=true shows videos", f"or set {key}.film=false")
            _film_fits(config, key, task)
        if isinstance(task, ClipDirectionConfig):
            _refuse(config, f"{key}.kind={task.kind} shows videos", "or choose another task")


def _film_fits(config: RunConfig, key: str, task: GymnasiumConfig) -> None:
    """The frames of an action are no more than a video may have."""
    assert config.model.vlm is not None
    assert config.model.vlm.video is not None, "refused before"
    most = config.model.vlm.video.max_frames
    if task.frame_skip + 1 > most:
        raise ConfigError(
            f"{key}.frame_skip={task.frame_skip} makes a video of {task.frame_skip + 1} frames with {key}.film=true, "
            f"more than model.vlm.video.max_frames={most}, so every episode would fail: set "
            f"{key}.frame_skip={most - 1}, or raise max_frames"
        )


def rows_are_shown(config: RunConfig, task: Task, key: str = "task") -> None:
    """Refuse a task whose rows show videos, where the run cannot show them. `key` is that of its settings."""
    from vlmrl.tasks.loading import shows_videos

    if not shows_videos(task):
        return
    remedy = f"or leave the videos out with {key}.columns.videos=[]"
    _refuse(config, f"the rows of {key}.path show videos", remedy)
    for package in ("av", "torchvision"):
        if not is_installed(package):
            need = Need(package, f"{key}.path with videos", "no video can be shown", pip_line("video"), remedy[3:])
            raise ConfigError(need.message())


def _refuse(config: RunConfig, what: str, remedy: str = "or leave the videos out") -> None:
    vlm, renderer = config.model.vlm, config.orchestrator.renderer
    if vlm is None:
        raise ConfigError(
            f"{what}, and model.name={config.model.name} is a text-only model (model.vlm=null), so every rollout would "
            f"fail: choose a model that takes videos, such as model=qwen3vl, {remedy}"
        )
    if vlm.video is None:
        raise ConfigError(
            f"{what}, and model.vlm.family={vlm.family} takes none (model.vlm.video=null), so every rollout would "
            f"fail: choose a model that takes videos, such as model=qwen3vl, {remedy}"
        )
    assert renderer is not None, "preflight refuses a run without a renderer"
    name = vlm.renderers[0] if renderer.name == "auto" else renderer.name
    if name != TEMPLATE:
        raise ConfigError(
            f"{what}, and orchestrator.renderer.name={renderer.name} makes none, so every rollout would fail: set "
            f"orchestrator/renderer=template, {remedy}"
        )
