"""Rows that show videos, next to models, renderers and machines that cannot show them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.row_files import task_of
from vlmrl.config.run import RunConfig
from vlmrl.errors import ConfigError
from vlmrl.preflight import installed
from vlmrl.preflight.rules.video import rows_are_shown, videos_are_shown
from vlmrl.tasks.loading import FirstExamples

FRAMES = ["img/1.png", "img/2.png"]
ROWS: dict[str, dict[str, Any]] = {
    "a column": {"question": "q", "video": [FRAMES], "answer": "a"},
    "a message": {"messages": [{"role": "user", "content": [{"type": "video", "video": FRAMES}, {"type": "text",
                  "text": "q"}]}, {"role": "assistant", "content": "a"}]},
}  # fmt: skip
TEMPLATE = (
    "task=dataset",
    "task.path=rows.jsonl",
    "reward=exact",
    "model=qwen3vl_tiny",
    "orchestrator/renderer=template",
)


@pytest.fixture
def all_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmrl.preflight.rules.video.is_installed", lambda package: True)


@pytest.mark.usefixtures("all_installed")
@pytest.mark.parametrize("row", ROWS)
def test_rows_with_videos_are_shown_or_refused(row: str, run_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    task = FirstExamples(task_of(tmp_path, ROWS[row]), 1)
    rows_are_shown(run_config(*TEMPLATE), task)
    for changes, words in (
        (("orchestrator.renderer.name=auto",), "name=auto makes none, .* set orchestrator/renderer=template,"),
        (("model.vlm.video=null",), "family=qwen3_vl takes none .model.vlm.video=null., .* or leave the videos"),
        (("model.vlm=null",), "is a text-only model .* choose a model that takes videos"),
    ):
        with pytest.raises(ConfigError, match=f"the rows of task.path show videos, and .*{words}"):
            rows_are_shown(run_config(*TEMPLATE, *changes), task)


def test_rows_without_videos_need_nothing(run_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    for cells in ({"video": None}, {"image": "img/1.png"}):
        row: dict[str, Any] = {"question": "q", "answer": "a"} | cells
        rows_are_shown(run_config(*TEMPLATE, "orchestrator.renderer.name=auto"), task_of(tmp_path, row))
    switched_off = task_of(tmp_path, ROWS["a column"], columns={"videos": []})
    rows_are_shown(run_config(*TEMPLATE, "orchestrator.renderer.name=auto"), switched_off)


@pytest.mark.parametrize("package", ["av", "torchvision"])
def test_missing_packages_are_named(
    package: str, run_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlmrl.preflight.rules.video.is_installed", lambda name: name != package)
    assert installed.pip_line("video") == "pip install 'vlmrl[video]'"
    with pytest.raises(ConfigError, match=rf"needs the package {package}, .*: pip install 'vlmrl\[video\]', or leave"):
        rows_are_shown(run_config(*TEMPLATE), task_of(tmp_path, ROWS["a column"]))


GAME = ("task=gymnasium", "task.env_id=CartPole-v1", "task.film=true", "model=qwen3vl_tiny")


def test_a_film_needs_what_shows_videos(run_config: Callable[..., RunConfig]) -> None:
    shown = (*GAME, "orchestrator/renderer=template")
    videos_are_shown(run_config(*shown))
    videos_are_shown(run_config(*GAME, "task.film=false"))
    for changes, words in (
        (GAME, "task.film=true shows videos, and .*renderer.name=auto makes none, .* or set task.film=false"),
        ((*shown, "task.frame_skip=64"), "a video of 65 frames .*max_frames=64, .* set task.frame_skip=63"),
        ((*shown, "model.vlm.video=null"), "task.film=true shows videos, and model.vlm.family=qwen3_vl takes none"),
    ):
        with pytest.raises(ConfigError, match=words):
            videos_are_shown(run_config(*changes))
    videos_are_shown(run_config(*shown, "task.frame_skip=63"))
    assert "torchvision" in [need.package for need in installed.needs(run_config(*shown))]
