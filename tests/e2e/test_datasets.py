"""`task=dataset` with the real command: every public layout starts, and a bad row costs itself."""

from __future__ import annotations

import json
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from support.command_line import Ended, Home, Scenarios, summary
from support.layout_fixtures import LAYOUTS, Layout
from support.video_files import encoded, moving
from vlmrl.record.metrics import read_metrics
from vlmrl.record.rollouts import read_rollouts

pytestmark = pytest.mark.slow

TINY = (
    *("trainer.warmup.steps=1", "trainer.warmup.batch_size=2", "trainer.warmup.demonstrations=correct"),
    *("trainer.max_steps=1", "orchestrator.groups_per_step=2", "orchestrator.group_size=2"),
    *("orchestrator.eval.problems=2", "orchestrator.max_new_tokens=8", "monitor.report=false"),
    *("monitor.wandb.mode=disabled", "task.eval_fraction=0.25"),
)

PLAIN = [layout for layout in LAYOUTS if not layout.overrides]
"""Those that need nothing but a path and a reward."""


def by_reward() -> dict[str, list[Layout]]:
    found: dict[str, list[Layout]] = defaultdict(list)
    for layout in PLAIN:
        found[layout.reward].append(layout)
    return found


@pytest.fixture(scope="module")
def runs(home: Home) -> Scenarios:
    data = home.path / "data"
    paths = {layout.name: layout.write(data / layout.name.replace(" ", "_")) for layout in LAYOUTS}

    def swept(reward: str, layouts: list[Layout]) -> Ended:
        """One process, a job per layout: `python -m vlmrl task=dataset task.path=<file> reward=<reward>` for each."""
        files = ",".join(str(paths[layout.name]) for layout in layouts)
        multirun = (
            "--multirun",
            f"hydra.sweep.dir={home.path}/outputs/{reward}",
            "hydra.sweep.subdir=${hydra:job.num}",
        )
        return home.vlmrl(*multirun, "task=dataset", f"task.path={files}", f"reward={reward}", *TINY)

    def alone(layout: Layout) -> tuple[Path, Ended]:
        run = home.path / "outputs" / layout.name
        return run, home.vlmrl(*layout.command(paths[layout.name]), *TINY, f"hydra.run.dir={run}")

    sweeps: dict[str, Any] = {
        reward: (lambda reward=reward, layouts=layouts: swept(reward, layouts))
        for reward, layouts in by_reward().items()
    }
    others: dict[str, Any] = {
        layout.name: (lambda layout=layout: alone(layout)) for layout in LAYOUTS if layout.overrides
    }
    return Scenarios(**sweeps, **others)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name.replace(" ", "_"))
def test_the_command_of_a_public_layout(layout: Layout, runs: Scenarios, home: Home) -> None:
    if layout.overrides:
        run, ended = runs[layout.name]
    else:
        ended = runs[layout.reward]
        run = home.path / "outputs" / layout.reward / str(by_reward()[layout.reward].index(layout))
    assert ended.code == 0, ended.err
    assert summary(run)["exit_reason"] == "finished"
    line = read_metrics(run / "metrics.jsonl")[-1]
    assert line["step"] == 1
    assert f"reward/{layout.reward}" in line, "the term had an answer to compare with"
    (record, *_) = read_rollouts(run / "rollouts/step_000001.parquet")
    assert len(record["turns"][0]["placeholders"]) == layout.images


# ── rows that cannot be used ────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def bad(home: Home) -> tuple[Path, Ended, Ended]:
    """A run whose rows 1, 3 and 5 are bad, and its own rollouts as data of a second one."""
    folder = home.path / "bad"
    plain = next(layout for layout in LAYOUTS if layout.name == "plain")
    path = plain.write(folder)
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    rows[1]["answer"], rows[3]["image"], rows[5]["question"] = None, "pictures/none.png", "<image><image>?"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    run = home.path / "outputs/bad"
    start = ("task=dataset", f"task.path={path}", "reward=exact", *TINY, "trainer.max_steps=12")
    ended = home.vlmrl(*start, f"hydra.run.dir={run}")
    again = home.vlmrl(
        *("mode=sft", "task=dataset", f"task.path={run}/rollouts", "reward=exact", *TINY),
        f"hydra.run.dir={home.path}/outputs/own",
    )
    return run, ended, again


def test_a_bad_row_costs_itself(bad: tuple[Path, Ended, Ended]) -> None:
    run, ended, _ = bad
    assert ended.code == 0, ended.err
    found = [json.loads(line) for line in (run / "bad_rows.jsonl").read_text("utf-8").splitlines()]
    assert sorted({line["row"] for line in found}) == [1, 3, 5]
    assert {line["source"] for line in found} == {"plain.jsonl"}
    last = read_metrics(run / "metrics.jsonl")[-1]
    assert last["rollouts/dropped"] == 0


def test_the_screen_says_what_was_recognized(bad: tuple[Path, Ended, Ended]) -> None:
    _, ended, _ = bad
    assert "prompt      question (text)" in ended.out
    assert "images      image (text)" in ended.out


def test_rollouts_of_a_run_are_a_data_set(bad: tuple[Path, Ended, Ended], home: Home) -> None:
    _, _, again = bad
    assert again.code == 0, again.err
    assert "messages    messages" in again.out
    assert read_metrics(home.path / "outputs/own/metrics.jsonl")[-1]["eval/demonstration_loss"] > 0


def test_a_wrong_image_root_is_found_before_the_run(home: Home) -> None:
    path = home.path / "wrong/rows.jsonl"
    path.parent.mkdir()
    path.write_text(json.dumps({"question": "q", "answer": "a", "image": "x.png"}) + "\n", "utf-8")
    ended = home.vlmrl("task=dataset", f"task.path={path}", "reward=exact", "dry_run=true", "task.eval_fraction=0")
    assert ended.code == 2
    assert "x.png does not exist: set task.image_root" in ended.err


def test_a_column_that_does_not_exist_is_refused(home: Home) -> None:
    path = home.path / "columns/rows.jsonl"
    path.parent.mkdir()
    path.write_text(json.dumps({"question": "q", "answer": "a"}) + "\n", "utf-8")
    start = ("task=dataset", f"task.path={path}", "reward=exact", "dry_run=true", "task.columns.answer=anser")
    ended = home.vlmrl(*start)
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert "task.columns.answer=anser: there is no such column" in ended.err
    assert "did you mean answer?" in ended.err


# ── videos ──────────────────────────────────────────────────────────────────────────────────────────────────

WITH_VIDEOS = ("orchestrator/renderer=template", "model.vlm.video.fps=2", "task.eval_fraction=0.5")


@pytest.fixture(scope="module")
def clips(home: Home) -> tuple[Path, Ended, Ended]:
    """A run on rows of ms-swift, with a missing file in row 3, and its own rollouts as data of a second one."""
    if not all(map(find_spec, ("av", "torchvision"))):  # they are the commands', not this process's
        pytest.skip("av and torchvision are not installed")
    folder = home.path / "clips"
    folder.mkdir()
    for number in range(8):
        (folder / f"{number}.mkv").write_bytes(encoded(moving(10, seed=number), rate=4))
    rows = [
        {
            "messages": [
                {"role": "user", "content": "Which is <video>?"},
                {"role": "assistant", "content": str(number)},
            ],
            "videos": [f"{number}.mkv" if number != 3 else "none.mkv"],
        }
        for number in range(8)
    ]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    run = home.path / "outputs/clips"
    start = ("task=dataset", f"task.path={path}", "reward=exact", *TINY, *WITH_VIDEOS, "trainer.max_steps=4")
    ended = home.vlmrl(*start, f"hydra.run.dir={run}")
    again = home.vlmrl(
        *("task=dataset", f"task.path={run}/rollouts", "reward=exact", *TINY, *WITH_VIDEOS),
        f"hydra.run.dir={home.path}/outputs/clips_again",
    )
    return run, ended, again


def video_hashes(run: Path) -> set[str]:
    tables = [pq.read_table(path, columns=["videos"]) for path in sorted((run / "rollouts").glob("*.parquet"))]
    return {video["hash"] for table in tables for row in table.to_pylist() for video in row["videos"]}


def test_videos_of_rows_are_shown_and_bad_ones_cost_themselves(clips: tuple[Path, Ended, Ended]) -> None:
    run, ended, _ = clips
    assert ended.code == 0, ended.err
    assert "videos      videos (list of text)" in ended.out
    lines = (run / "bad_rows.jsonl").read_text("utf-8").splitlines()
    found = {line["row"]: line["reason"] for line in map(json.loads, lines)}
    assert list(found) == [3]
    assert "none.mkv does not exist: set task.video_root" in found[3]
    (record, *_) = read_rollouts(run / "rollouts/step_000001.parquet")
    assert len(record["turns"][0]["placeholders"]) == 1
    assert len(video_hashes(run)) >= 3, "each row shows a video of its own"


def test_rollouts_with_videos_are_a_data_set_of_the_same_videos(clips: tuple[Path, Ended, Ended], home: Home) -> None:
    run, _, again = clips
    assert again.code == 0, again.err
    shown = video_hashes(home.path / "outputs/clips_again")
    assert shown
    assert shown <= video_hashes(run), "frames, times and rates are those that were recorded"


def test_videos_without_a_renderer_for_them_are_refused_before_the_run(
    clips: tuple[Path, Ended, Ended], home: Home
) -> None:
    ended = home.vlmrl("task=dataset", f"task.path={home.path}/clips/rows.jsonl", "reward=exact", "dry_run=true")
    assert ended.code == 2
    assert "set orchestrator/renderer=template" in ended.err
