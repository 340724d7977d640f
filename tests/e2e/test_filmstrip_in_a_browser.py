"""The filmstrip of a video in report.html, in a real Chromium: its frames in their order, their times, its tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.browser import Tab, in_chromium
from support.report_runs import config_of, record
from support.rollout_builders import image
from support.video_rollouts import TIMES, VIDEO_TOKEN, frames_of, video, video_rollout
from vlmrl.cli.past_runs import default_config
from vlmrl.monitor.report.page import write_report
from vlmrl.record.rollouts import read_rollouts
from vlmrl.record.run_dir import RunDir
from vlmrl.rendering.images import image_hash

pytestmark = in_chromium

LONG = video(5, frames_of(5, 40), [number / 4 for number in range(40)])
"""More frames than a filmstrip shows."""


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    config = config_of("orchestrator.groups_per_step=1", "orchestrator.group_size=2")
    rollouts = [video_rollout(), video_rollout((LONG,), index=1)]
    names = {VIDEO_TOKEN: "<|video_pad|>"}
    run = record(tmp_path_factory.mktemp("clips") / "run", config, [(1, rollouts)], names=names)
    write_report({run.name: run}, run.report, default_config())
    return run


@pytest.fixture(scope="module")
def page(run_dir: RunDir) -> Path:
    return run_dir.report


def strips(tab: Tab, where: str) -> list[tuple[str, list[str], list[str]]]:
    """Hash, hashes of the frames and times of each filmstrip."""
    found = tab.page.locator(f"{where} .filmstrip").evaluate_all(
        """all => all.map((each) => [each.dataset.hash,
            [...each.querySelectorAll(".still img")].map((img) => img.dataset.hash),
            [...each.querySelectorAll(".still small")].map((text) => text.textContent)])"""
    )
    return [(hash, frames, times) for hash, frames, times in found]


def test_the_frames_stand_in_order_with_their_times(browser: Any, page: Path) -> None:
    with Tab(browser, page, "#rollouts?rollout=train/000001/00/00&view=one") as tab:
        times = ["0 s", "0.5 s", "1.25 s", "2 s"]
        wanted = [(video(s).hash, [image_hash(frame) for frame in frames_of(s)], times) for s in (1, 2)]
        assert len(TIMES) == len(times)
        assert strips(tab, ".message") == wanted
        images = tab.page.locator(".said > img").evaluate_all("all => all.map(each => each.dataset.hash)")
        assert images == [image(10).hash, image(20).hash], "the still pictures around the first video"
        pixels = (
            tab.page.locator(".filmstrip img")
            .nth(1)
            .evaluate(
                """async (image) => {
                await image.decode();
                const canvas = document.createElement("canvas");
                [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
                const context = canvas.getContext("2d");
                context.drawImage(image, 0, 0);
                return [...context.getImageData(0, 0, canvas.width, canvas.height).data];
            }"""
            )
        )
        assert np.array_equal(np.array(pixels, np.uint8).reshape(8, 8, 4)[..., :3], frames_of(1)[1])

        tab.page.keyboard.press("m")
        assert strips(tab, ".placeholder.video") == wanted
        labels = tab.texts(".placeholder.video > small")
        assert labels == ["<|video_pad|> × 4"] * 2, "the gap between the frames gets no feature"


def test_a_long_video_shows_some_of_its_frames(browser: Any, page: Path) -> None:
    with Tab(browser, page, "#rollouts?rollout=train/000001/00/01&view=one") as tab:
        ((_, frames, times),) = strips(tab, ".message")
        assert (len(frames), frames[0], frames[-1]) == (12, LONG.frame_hashes[0], LONG.frame_hashes[-1])
        assert (times[0], times[-1]) == ("0 s", "9.75 s")
        assert "12 of 40 frames" in tab.texts(".filmstrip > small")
        tab.page.keyboard.press("g")
        assert len(strips(tab, ".detail")) >= 2, "siblings show theirs"


def test_downloaded_rollouts_have_their_videos(browser: Any, run_dir: RunDir) -> None:
    records = {each["rollout_id"]: each for each in read_rollouts(run_dir.rollouts_file("step", 1))}
    with Tab(browser, run_dir.report, "#rollouts") as tab:
        kept = [json.loads(line) for line in tab.download("JSONL").splitlines()]
    assert len(kept) == len(records) == 2
    for each in kept:
        assert each["videos"] == records[each["rollout_id"]]["videos"]
        assert list(each["videos"]) == list(records[each["rollout_id"]]["videos"])
