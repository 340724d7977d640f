"""Problems for programs: what a program is told of a row, and of a number."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import PIL.Image
import pytest

from vlmrl.config.program import ProgramConfig
from vlmrl.rendering.data_urls import png_url
from vlmrl.tasks.base import Reference
from vlmrl.tasks.loading import load_task
from vlmrl.tasks.mixture import MixedProblem
from vlmrl.tasks.programs.problems import chat_messages, played_outside
from vlmrl.tasks.programs.task import ProgramTask
from vlmrl.types import Image, Message, Video

PIXELS = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)


def rows(folder: Path, count: int = 4) -> str:
    PIL.Image.fromarray(PIXELS).save(folder / "a.png")
    path = folder / "rows.jsonl"
    path.write_text(
        "".join(
            json.dumps({"problem": f"Which number is {i}?", "images": ["a.png"], "answer": str(i), "level": i}) + "\n"
            for i in range(count)
        )
    )
    return str(path)


def task(**settings: Any) -> ProgramTask:
    made = load_task(ProgramConfig(command="agent", **settings), seed=7)
    assert isinstance(made, ProgramTask)
    return made


def test_a_number_is_told_with_a_seed_that_siblings_share() -> None:
    told = task(args={"level": 2}).problem("train", 5)
    assert told.id == "train 5"
    assert {**told.payload, "seed": 0} == {
        "id": "train 5",
        "split": "train",
        "index": 5,
        "seed": 0,
        "args": {"level": 2},
    }
    assert told.payload == task(args={"level": 2}).problem("train", 5).payload
    assert 0 <= told.payload["seed"] < 2**32
    assert len({task().problem("train", index).payload["seed"] for index in range(64)}) == 64
    assert not isinstance(told, Reference), "there is no answer to compare with"
    assert task().num_rows("train") is None


def test_seeds_of_the_evaluation_do_not_depend_on_the_runs() -> None:
    other = ProgramTask(ProgramConfig(command="agent"), seed=8)
    assert other.problem("eval", 3).payload == task().problem("eval", 3).payload
    assert other.problem("train", 3).payload != task().problem("train", 3).payload


def test_a_row_is_told_as_messages_with_its_pixels_answer_and_columns(tmp_path: Path) -> None:
    made = task(path=rows(tmp_path), eval_fraction=0.0)
    problem = made.problem("train", 0)
    assert made.num_rows("train") == 4
    assert isinstance(problem, Reference)
    told = orjson.loads(orjson.dumps(problem.payload))
    (message,) = told["messages"]
    image, text = message["content"]
    assert (message["role"], image["type"], text["text"]) == ("user", "image_url", f"Which number is {problem.answer}?")
    head, _, data = image["image_url"]["url"].partition(",")
    assert head == "data:image/png;base64"
    assert np.array_equal(np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(data)))), PIXELS)
    assert (told["answer"], told["columns"]["level"]) == (problem.answer, int(problem.answer))
    assert told["id"] == problem.id


def test_values_that_json_cannot_hold_are_left_out(tmp_path: Path) -> None:
    problem = task(path=rows(tmp_path), eval_fraction=0.0).problem("train", 0)
    object.__setattr__(problem.row, "columns", {"picture": object(), "level": 1})  # type: ignore[union-attr]
    assert problem.payload["columns"] == {"level": 1}


def test_the_demonstration_of_a_row_is_that_of_the_data_set(tmp_path: Path) -> None:
    made = task(path=rows(tmp_path), eval_fraction=0.0)
    problem = made.problem("train", 0)
    *prompt, answer = made.demonstration(problem, random_answers=False, seed=0)
    assert answer == Message.of("assistant", problem.answer)  # type: ignore[union-attr]
    assert tuple(prompt) == problem.messages


def test_without_rows_there_are_no_demonstrations_and_no_texts() -> None:
    with pytest.raises(NotImplementedError, match=r"task.path has no demonstrations, .* set trainer.warmup.steps=0"):
        task().demonstration(task().problem("train", 0), random_answers=True, seed=0)
    with pytest.raises(NotImplementedError, match=r"task.texts is empty"):
        task().texts()
    assert task(texts=["a b"]).texts() == ("a b",)


def test_texts_are_those_of_the_config_and_of_the_rows(tmp_path: Path) -> None:
    texts = task(path=rows(tmp_path), texts=["More"]).texts()
    assert texts[0] == "More"
    assert any("Which number" in text for text in texts)


def test_a_problem_of_a_mixture_has_it_inside_and_others_have_none() -> None:
    told = task().problem("train", 0)
    assert played_outside(MixedProblem("web", 3, told)) is told
    assert played_outside(told) is told
    assert played_outside(MixedProblem("web", 3, object())) is None  # type: ignore[arg-type]
    assert played_outside(None) is None


def test_a_program_is_sent_videos_as_files_and_as_frames(tmp_path: Path) -> None:
    clip = tmp_path / "a.webm"
    clip.write_bytes(b"webm")
    frames = np.stack([PIXELS, PIXELS[::-1]])
    (message,) = chat_messages([Message.of("user", Video(clip), "or", Video(b"mp4"), Video(frames, fps=2.0))])
    file, _, content, sampled = message["content"]
    assert file["video_url"]["url"] == f"data:video/webm;base64,{base64.b64encode(b'webm').decode()}"
    assert content["video_url"]["url"] == f"data:video/mp4;base64,{base64.b64encode(b'mp4').decode()}"
    urls = [png_url(frame).partition(",")[2] for frame in frames]
    assert sampled["video_url"] == {"url": f"data:video/jpeg;base64,{','.join(urls)}", "fps": 2.0}


def test_messages_keep_the_order_of_text_and_images() -> None:
    (message,) = chat_messages([Message.of("user", "a", Image(PIXELS), "b")])
    assert [part["type"] for part in message["content"]] == ["text", "image_url", "text"]
    assert message["content"][1]["image_url"]["url"] == png_url(PIXELS)
