"""Videos of rows: columns, cells, markers and parts of every convention, held-out rows, and what is refused."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from support.row_files import first, png, task_of, written
from support.video_files import encoded
from vlmrl.config.dataset import DatasetConfig
from vlmrl.errors import ConfigError
from vlmrl.tasks.base import BadRow, NotInSplit
from vlmrl.tasks.dataset.columns import Unusable
from vlmrl.tasks.dataset.task import DatasetProblem, DatasetTask
from vlmrl.tasks.dataset.videos import cells_of
from vlmrl.types import Text, Video

FRAMES = ["img/1.png", "img/2.png", "img/3.png"]
"""A video as a list of its frames, of the shades 10, 20 and 30."""
BACK = FRAMES[::-1]
SAY = {"role": "assistant", "content": "a"}


def videos(problem: DatasetProblem) -> list[Video]:
    return [part for message in problem.messages for part in message.content if isinstance(part, Video)]


def shades(source: Any) -> str:
    """`123` for a video of the pictures 1, 2 and 3, and the name of a file."""
    return source.name if isinstance(source, Path) else "".join(str(frame[0, 0, 0] // 10) for frame in source)


def shown(problem: DatasetProblem) -> str:
    """The prompt, with `<1>` for picture 1 and `<v123>` for the video of pictures 1, 2 and 3."""
    texts = []
    for message in problem.messages:
        for part in message.content:
            if isinstance(part, Text):
                texts.append(part.text)
            else:
                is_video = isinstance(part, Video)
                texts.append(f"<{'v' * is_video}{shades(part.source if is_video else [part.source])}>")
    return "".join(texts)


def refused(folder: Path, row: dict[str, Any], **settings: Any) -> str:
    with pytest.raises(BadRow) as no:
        first(folder, row, **settings)
    assert (no.value.source, no.value.row) == ("rows.jsonl", 0)
    return no.value.reason


def mp4(shade: int, count: int = 4) -> bytes:
    """A grey video of four frames a second."""
    return encoded(np.full((count, 32, 32, 3), shade, np.uint8), rate=4, kind=("mp4", "mpeg4", "yuv420p"))


# ── cells ───────────────────────────────────────────────────────────────────────────────────────────────────

PNG, MP4 = png(10), b"\0\0\0\x20ftypisom" + b"\0" * 20
PIXELS = np.zeros((2, 8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    ("cell", "sources"),
    [
        (None, []),
        ("", []),
        ([None], []),
        ("a.mp4", ["a.mp4"]),
        ('["a.mp4", "b.webm"]', ["a.mp4", "b.webm"]),
        (["a.mp4"], ["a.mp4"]),
        (MP4, [MP4]),
        ({"bytes": MP4, "path": "a.mp4"}, [MP4]),
        ([{"bytes": None, "path": "a.mp4"}, {"bytes": MP4, "path": None}], ["a.mp4", MP4]),
        (FRAMES, [tuple(FRAMES)]),
        ([FRAMES, BACK], [tuple(FRAMES), tuple(BACK)]),
        ([PNG, PNG], [(PNG, PNG)]),
        ([MP4, MP4], [MP4, MP4]),
        ([{"bytes": PNG, "path": None}, {"bytes": PNG, "path": None}], [({"bytes": PNG, "path": None},) * 2]),
        ({"type": "video", "video": FRAMES}, [tuple(FRAMES)]),
        ({"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AA=="}}, ["data:video/mp4;base64,AA=="]),
        ([{"type": "video", "video": "file:///a.mp4", "nframes": None}], ["file:///a.mp4"]),
    ],
)
def test_cells(cell: Any, sources: list[Any]) -> None:
    assert [each.source for each in cells_of(cell)] == sources


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        (["a.mp4", "b.png"], "1 pictures and 1 videos"),
        (7, "a video is 7, a int"),
        ({"thing": 1}, "a struct of thing"),
    ],
)
def test_cells_that_are_no_video(cell: Any, said: str) -> None:
    with pytest.raises(Unusable, match=said):
        list(cells_of(cell))


def test_an_array_is_one_video() -> None:
    (cell,) = cells_of(PIXELS)
    assert cell.source is PIXELS


# ── conventions ─────────────────────────────────────────────────────────────────────────────────────────────


def asks(*content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(content) if len(content) > 1 else content[0]}, SAY]


QUESTION = {"type": "text", "text": "q"}

ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "one": ({"question": "q", "video": [FRAMES], "answer": "a"}, "<v123>q"),
    "two": ({"question": "q", "videos": [FRAMES, BACK], "answer": "a"}, "<v123><v321>q"),
    "none": ({"question": "q", "video": None, "answer": "a"}, "q"),
    "marker": ({"question": "a <video> b", "video": [FRAMES], "answer": "a"}, "a <v123> b"),
    "numbers": (
        {"question": "<video 2> after <video 1>?", "videos": [FRAMES, BACK], "answer": "a"},
        "<v321> after <v123>?",
    ),
    "mixed": (
        {"question": "<video> or <image>?", "image": "img/4.png", "video": [FRAMES], "answer": "a"},
        "<v123> or <4>?",
    ),
    "videos without a marker": (
        {"question": "q <image>", "image": "img/4.png", "video": [FRAMES], "answer": "a"},
        "<v123>q <4>",
    ),
    "verl": (
        {
            "prompt": [{"role": "user", "content": "<video>q"}],
            "videos": [{"type": "video", "video": FRAMES}],
            "reward_model": {"ground_truth": "a"},
        },
        "<v123>q",
    ),
    "LLaMA-Factory": (
        {
            "conversations": [{"from": "human", "value": "<video><image>q"}, {"from": "gpt", "value": "a"}],
            "videos": [FRAMES],
            "images": ["img/4.png"],
        },
        "<v123><4>q",
    ),
    "ms-swift": ({"messages": asks("<video>q<video>"), "videos": [FRAMES, BACK]}, "<v123>q<v321>"),
    "TRL": ({"prompt": asks({"type": "video"}, QUESTION)[:1], "videos": [FRAMES], "answer": "a"}, "<v123>q"),
    "Qwen": (
        {
            "messages": asks(
                {"type": "video", "video": FRAMES}, {"type": "image", "image": "img/4.png"}, QUESTION,
                {"type": "video", "video": BACK},
            )
        },
        "<v123><4>q<v321>",
    ),
    "LLaVA-Video": (
        {
            "video": [FRAMES],
            "conversations": [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}],
        },
        "<v123>\nq",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_conventions(name: str, tmp_path: Path) -> None:
    row, prompt = ROWS[name]
    problem = first(tmp_path, row)
    assert shown(problem) == prompt
    assert problem.answer == "a"


def test_frames_in_another_order_are_another_video(tmp_path: Path) -> None:
    """Planted mistakes: two frames swapped, and one lost."""
    ids = {
        first(tmp_path, {"question": "q", "video": [frames], "answer": "a"}).id
        for frames in (FRAMES, BACK, FRAMES[:2], [*FRAMES, FRAMES[2]])
    }
    assert len(ids) == 4


def test_the_rate_of_frames_is_honoured(tmp_path: Path) -> None:
    for name in ("sample_fps", "fps"):
        row = {"question": "q", "videos": [{"video": FRAMES, name: 4.0}], "answer": "a"}
        (video,) = videos(first(tmp_path, row))
        assert (video.times, video.fps) == ((0.0, 0.25, 0.5), None)
    (video,) = videos(first(tmp_path, {"question": "q", "video": [FRAMES], "answer": "a"}))
    assert video.times is None


def test_the_times_of_frames_are_honoured_as_a_run_records_them(tmp_path: Path) -> None:
    cell = {"hash": "ab", "frames": FRAMES, "times": [0.0, 0.5, 2.0], "fps": 1.5, "tensors": "{}"}
    (video,) = videos(first(tmp_path, {"question": "q", "videos": [cell], "answer": "a"}))
    assert (video.times, video.fps, shades(video.source)) == ((0.0, 0.5, 2.0), 1.5, "123")
    ids = {
        first(tmp_path, {"question": "q", "videos": [cell | change], "answer": "a"}).id
        for change in ({}, {"times": [0.0, 0.5, 2.1]}, {"fps": 1.0})
    }
    assert len(ids) == 3
    for times, said in (([0.0, 2.0, 1.0], "not 3 ascending numbers"), ([0.0, 1.0], "not 3"), (["x"], "no numbers of")):
        assert said in refused(tmp_path, {"question": "q", "videos": [cell | {"times": times}], "answer": "a"})


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "<video> and <video>", "video": [FRAMES]}, "2 places for videos (<video>) and the row 1 video,"),
        ({"question": "<video>", "videos": [FRAMES, BACK]}, "1 place for videos (<video>) and the row 2 videos,"),
        ({"question": "<video>", "video": None}, "1 place for videos (<video>) and the row 0 videos,"),
        ({"question": "<video 3>", "video": [FRAMES]}, "the text names video 3, but the row has 1,"),
        ({"question": "<image>", "videos": [FRAMES, BACK]}, "1 place for images (<image>) and the row 0 images,"),
        ({"question": "q", "video": [FRAMES[:1]]}, "of one frame shows no time"),
        ({"question": "q", "video": ["img/1.png", "img/none.png"]}, "none.png does not exist: set task.video_root"),
        ({"question": "q", "video": "none.mp4"}, "none.mp4 does not exist: set task.video_root"),
        ({"question": "q", "video": "https://host/a.mp4"}, "the video 'https://host/a.mp4' is a URL"),
        ({"question": "q", "videos": [{"video": FRAMES, "nframes": 8}]}, "the row sets nframes=8 for its video, and a"),
        ({"question": "q", "videos": [{"video": FRAMES, "nframes": 8}]}, "set model.vlm.video.num_frames for all"),
        ({"question": "q", "videos": [{"video": "a.mp4", "fps": 1.0}]}, "the row sets fps=1.0 for its video"),
        ({"question": "q", "videos": [{"video": FRAMES, "resized_height": 8}]}, "task.ignore_video_settings=true"),
        ({"question": "q", "videos": [{"video": FRAMES, "video_start": 2.5}]}, "(video_start=2.5), and videos are"),
        ({"question": "q", "videos": [{"video": FRAMES, "fps": 0}]}, "the row sets fps=0 for its frames, which is no"),
        ({"messages": asks({"type": "video", "video": FRAMES}, QUESTION), "videos": [BACK]}, "videos 1 more without a"),
        ({"messages": asks({"type": "video", "video": [FRAMES, BACK]}, QUESTION)}, "a video part of a message holds 2"),
        ({"messages": asks({"type": "audio", "audio": "a"}, QUESTION)}, "only text, images and videos are read"),
    ],
)  # fmt: skip
def test_bad_rows(row: dict[str, Any], said: str, tmp_path: Path) -> None:
    assert said in refused(tmp_path, {"answer": "a"} | row)


def test_settings_of_rows_can_be_ignored(tmp_path: Path) -> None:
    row = {"question": "q", "videos": [{"video": FRAMES, "nframes": 8, "max_pixels": 64}], "answer": "a"}
    assert shown(first(tmp_path, row, ignore_video_settings=True)) == "<v123>q"
    cut = {"question": "q", "videos": [{"video": FRAMES, "video_end": 1.0}], "answer": "a"}
    assert "cut the file" in refused(tmp_path, cut, ignore_video_settings=True)


# ── columns ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("column", "cell"),
    [("Videos", [FRAMES]), ("video_path", "a.mp4"), ("file_name", "clips/a.mp4"), ("media", ["a.webm"])],
)
def test_columns_that_hold_videos(column: str, cell: Any, tmp_path: Path) -> None:
    task = task_of(tmp_path, {"question": "q", column: cell, "answer": "a"})
    layout = task.pool("train").layout
    assert (layout.videos, layout.images) == ((column,), ())
    assert column in task.data_table()["videos"]


def test_columns_are_set_and_switched_off(tmp_path: Path) -> None:
    row = {"question": "q", "before": [FRAMES], "after": [BACK], "videos": [FRAMES], "answer": "a"}
    assert shown(first(tmp_path, row, columns={"videos": ["before", "after"]})) == "<v123><v321>q"
    assert shown(first(tmp_path, row, columns={"videos": []})) == "q"
    with pytest.raises(ConfigError, match=r"task\.columns\.videos=befor: .*did you mean before"):
        task_of(tmp_path, row, columns={"videos": "befor"})


def test_two_columns_that_name_other_files(tmp_path: Path) -> None:
    row = {"question": "q", "video": "a.mp4", "videos": ["b.mp4"], "answer": "a"}
    with pytest.raises(ConfigError, match=r"task\.columns\.videos can be videos or video, which differ"):
        task_of(tmp_path, row)
    task_of(tmp_path, row | {"videos": ["a.mp4"]})


def test_the_template_places_videos(tmp_path: Path) -> None:
    row = {"question": "q", "video": [FRAMES], "image": "img/4.png", "answer": "a"}
    assert shown(first(tmp_path, row, template="{{ question }}: {{ video }} {{ image }}")) == "q: <v123> <4>"
    assert shown(first(tmp_path, row, template="{{ content }}?")) == "<4><v123>q?"


# ── held-out rows, the blind control, pairs ─────────────────────────────────────────────────────────────────


def directions(count: int) -> list[dict[str, Any]]:
    """One question; the video decides. Frames of row n begin at picture n % 5, forwards or backwards."""
    frames = [[f"img/{(start + step) % 5}.png" for step in (0, 1, 2)] for start in range(5)]
    return [
        {"question": "Which way?", "video": [(frames[n % 5])[:: 1 if n // 5 % 2 else -1]], "answer": str(n)}
        for n in range(count)
    ]


def test_the_same_video_never_leaks(tmp_path: Path) -> None:
    """30 rows show ten videos, three times each; a video is the order of its frames, not their set."""
    path = written(tmp_path, directions(30))
    task = DatasetTask(DatasetConfig(path=str(path), eval_fraction=0.5), seed=0)
    sides: dict[str, set[str]] = {"train": set(), "eval": set()}
    for split in ("train", "eval"):
        for row in range(30):
            try:
                sides[split].add(shown(task.problem_of_row(split, row)))
            except NotInSplit:
                continue
    assert len(sides["train"] | sides["eval"]) == 10
    assert not sides["train"] & sides["eval"]
    assert sides["train"]
    assert sides["eval"]


def test_the_blind_control_shows_another_video(tmp_path: Path) -> None:
    rows = [*directions(5), {"question": "q", "image": "img/4.png", "answer": "a"}]
    task = task_of(tmp_path, *rows, shuffle_images=True)
    seen = [shown(task.problem_of_row("train", row)) for row in range(5)]
    true = [shown(task_of(tmp_path, *rows).problem_of_row("train", row)) for row in range(5)]
    assert all(prompt.startswith("<v") for prompt in seen)
    assert seen != true
    with pytest.raises(BadRow, match=r"none of 64 other rows has 1 images, so task.shuffle_images"):
        task.problem_of_row("train", 5)


def test_demonstrations_and_pairs_have_the_video(tmp_path: Path) -> None:
    row = {"question": "<video>q", "video": [FRAMES], "chosen": "good", "rejected": "bad"}
    task = task_of(tmp_path, row)
    problem = task.problem_of_row("train", 0)
    preference = task.preference(problem)
    assert preference.prompt == problem.messages
    assert (preference.chosen.content[0].text, preference.rejected.content[0].text) == ("good", "bad")  # type: ignore[union-attr]
    assert videos(problem)
    (prompt, answer) = task.demonstration(problem, random_answers=False, seed=0)
    assert any(isinstance(part, Video) for part in prompt.content)
    assert answer.content[0].text == "good"  # type: ignore[union-attr]


# ── files ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_forms_of_a_file_are_one_video(tmp_path: Path) -> None:
    """A path, bytes, `datasets`' struct, base64 and a data URL, in JSON and in Parquet as `datasets` writes it."""
    data = mp4(100)
    (tmp_path / "a.mp4").write_bytes(data)
    text = base64.b64encode(data).decode()
    cells = [
        "a.mp4",
        str(tmp_path / "a.mp4"),
        text,
        f"data:video/mp4;base64,{text}",
        {"bytes": None, "path": "a.mp4"},
    ]
    found = [first(tmp_path, {"question": "q", "video": cell, "answer": "a"}) for cell in cells]
    rows = [{"question": "q", "clip_of_it": {"bytes": data, "path": "x.mp4"}, "answer": "a"}]
    features = {"clip_of_it": {"_type": "Video"}}
    table = pa.Table.from_pylist(rows).replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    packed = DatasetTask(DatasetConfig(path=str(tmp_path / "rows.parquet"), eval_fraction=0.0), seed=0)
    assert packed.pool("train").layout.videos == ("clip_of_it",)
    found.append(packed.problem_of_row("train", 0))
    assert len({problem.id.rsplit(":", 1)[1] for problem in found}) == 1
    assert [type(videos(problem)[0].source) for problem in found[:2]] == [type(tmp_path)] * 2
    assert videos(found[-1])[0].source == data


def test_files_below_the_root_and_other_contents(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips/a.mp4").write_bytes(mp4(100))
    (tmp_path / "clips/b.mp4").write_bytes(mp4(200))
    root = str(tmp_path / "clips")
    ids = [
        first(tmp_path, {"question": "q", "video": name, "answer": "a"}, video_root=root).id.rsplit(":", 1)[1]
        for name in ("a.mp4", "b.mp4", "a.mp4")
    ]
    assert ids[0] == ids[2] != ids[1]


@pytest.mark.parametrize("content", [b"", b"no video", png(10), "cut"])
def test_broken_files_are_bad_rows(content: Any, tmp_path: Path) -> None:
    whole = mp4(100)
    (tmp_path / "a.mp4").write_bytes(whole[:200] if content == "cut" else content)
    reason = refused(tmp_path, {"question": "q", "video": "a.mp4", "answer": "a"})
    assert "a.mp4" in reason
    assert reason.endswith("repair or remove the video")


def test_a_file_that_changes_is_another_video(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    task = task_of(tmp_path, {"question": "q", "video": "a.mp4", "answer": "a"})
    path.write_bytes(mp4(100))
    before = [task.problem_of_row("train", 0).id for _ in range(2)]
    path.write_bytes(mp4(200, 5))
    assert before[0] == before[1] != task.problem_of_row("train", 0).id


def test_a_hub_may_not_lead_out_of_its_folder(tmp_path: Path) -> None:
    from vlmrl.tasks.dataset.files import Place
    from vlmrl.tasks.dataset.videos import VideoReader

    (cell,) = cells_of("../a.mp4")
    with pytest.raises(Unusable, match=r"which a data set from a hub may not read: set task.video_root"):
        VideoReader(None, fetch=False).load(cell, Place(str(tmp_path), str(tmp_path)))
