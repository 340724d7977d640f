"""A run whose task shows videos: what it records, and what replay, preview, play and DPO make of it."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from support.command_line import REPOSITORY, SHORT, Home
from support.moving_clips import TIMES, clip
from vlmrl.record.metrics import read_metrics
from vlmrl.record.rollouts import read_rollouts
from vlmrl.rendering.images import image_hash

pytestmark = [
    pytest.mark.slow,
    # Not importorskip: the import may fail where vlmrl has not prepared it.
    pytest.mark.skipif(find_spec("torchvision") is None, reason="pip install 'vlmrl[video]'"),
]

CLIPS = (
    "model=qwen3vl_tiny",
    "orchestrator/renderer=template",
    f"task={REPOSITORY}/tests/support/moving_clips.py:MovingClips",
    "task.max_turns=2",
    *SHORT,
)


@pytest.fixture(scope="module")
def run(home: Home) -> Path:
    short = ("trainer.max_steps=2", "trainer.checkpoint_every=1", "orchestrator.eval.every=0", "monitor.report=true")
    return home.made("clips", (*CLIPS, *short))


def test_every_frame_is_recorded_once(run: Path) -> None:
    records = list(read_rollouts(run / "rollouts/step_000002.parquet"))
    assert any(len(record["turns"]) == 2 for record in records)
    for record in records:
        index = int(record["problem_id"].split()[-1])
        for turn, source in zip(record["turns"], (clip(index, 9), clip(index + 101, 4)), strict=False):
            (part,) = (part for message in turn["messages"] for part in message["content"] if part["type"] == "video")
            found = record["videos"][part["hash"] or ""]
            # Sampled at 2 of its 3 frames a second, or shown whole at its own times.
            shown = np.array(found["times"]) * 3 if len(source) == 9 else np.arange(4)
            assert found["frames"] == [image_hash(source[round(at)]) for at in shown]
            if len(source) == 4:
                assert found["times"] == list(TIMES)
            for hash in found["frames"]:
                with PIL.Image.open(run / f"images/{hash}.png") as picture:
                    assert image_hash(np.asarray(picture)) == hash
    videos = {hash: video for record in records for hash, video in record["videos"].items()}
    line = read_metrics(run / "metrics.jsonl")[-1]
    assert line["videos/distinct"] == len(videos)
    assert line["videos/frames"] == sum(len(video["frames"]) for video in videos.values())
    assert '"videos":{"' in (run / "report.html").read_text()


def test_a_replay_makes_the_same_videos(home: Home, run: Path) -> None:
    assert home.vlmrl("mode=replay", f"run={run}", "step=2").code == 0
    content = json.loads((run / "replay/step_000002/replay.json").read_bytes())
    assert content["identical"], content["lines"]
    says = {line["name"]: line["says"] for line in content["lines"]}
    assert "pixel_values_videos" in says["tensors"]
    assert "images and videos have the pixels" in says["pictures"]


def test_preview_and_play_show_filmstrips(home: Home, run: Path) -> None:
    folder = home.path / "outputs"
    few = ("preview.problems=2", "preview.answers=0")
    ended = home.vlmrl("mode=preview", *CLIPS, *few, f"hydra.run.dir={folder}/preview")
    assert "<video: 18 tokens, 6 frames of 96 × 64>" in ended.out, ended
    assert "no_images" not in ended.out, "a prompt with a video looks at something"
    page = (folder / "preview/preview.html").read_text()
    assert re.search(r"6 frames of 96 × 64, from 0 to [\d.]+ s, each seen as 96 × 64, in 18 tokens", page)
    assert "frames per video" in page

    ended = home.vlmrl("mode=play", *CLIPS, "play.policy=random", f"hydra.run.dir={folder}/play")
    assert ended.code == 0, ended
    named = re.findall(r"(video|image) (\d): (\S+\.png)", ended.out)
    assert ("video", "1") in {(kind, number) for kind, number, _ in named}
    for kind, _, path in named:
        with PIL.Image.open(path) as picture:
            assert picture.width > 3 * 96 if kind == "video" else picture.width == 96


def test_the_documented_lines_make_the_clips_again(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (REPOSITORY / "docs/video.md").read_text().partition("## What a run leaves of its videos")[2]
    block = page.partition("```python\n")[2].partition("```")[0]
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs/latest").symlink_to(run)
    monkeypatch.chdir(tmp_path)
    made: dict[str, Any] = {}
    exec(block, made)
    shown = made["video"]["frames"]
    assert [Path(path).stem for path in made["frames"]] == [Path(path).stem for path in shown]
    assert all(Path(path).exists() for path in made["frames"])
