"""Conversations, markers and boxes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from support.row_files import first, images, shown, task_of
from vlmrl.tasks.base import BadRow

ASK = {"role": "user", "content": "q"}
SAY = {"role": "assistant", "content": "a"}


def refused(folder: Path, row: dict[str, Any], **settings: Any) -> str:
    with pytest.raises(BadRow) as no:
        first(folder, row, **settings)
    assert (no.value.source, no.value.row) == ("rows.jsonl", 0)
    return no.value.reason


# ── where images stand ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"question": "q", "image": "img/1.png"}, ["user: <1>q"]),
        ({"question": "q", "image": ["img/1.png", "img/2.png"]}, ["user: <1><2>q"]),
        ({"question": "q", "image": None}, ["user: q"]),
        ({"question": "a <image> b<image>\n", "image": ["img/1.png", "img/2.png"]}, ["user: a <1> b<2>\n"]),
        ({"question": "<image 2> or <image 1>, not <image 2>?", "image": ["img/1.png", "img/2.png"]},
         ["user: <2> or <1>, not <image 2>?"]),
        ({"question": "see <image 2>", "image": ["img/1.png", "img/2.png"]}, ["user: <1>see <2>"]),
        ({"question": "a <img> b </image>", "image": "img/1.png"}, ["user: <1>a <img> b </image>"]),
    ],
)  # fmt: skip
def test_places(row: dict[str, Any], prompt: list[str], tmp_path: Path) -> None:
    assert shown(first(tmp_path, row | {"answer": "a"})) == prompt


@pytest.mark.parametrize(
    ("question", "cells", "said"),
    [
        ("<image> and <image>", ["img/1.png"], "2 places for images (<image>) and the row 1 image,"),
        ("<image>", ["img/1.png", "img/2.png"], "1 place for images (<image>) and the row 2 images,"),
        ("<image>", None, "1 place for images (<image>) and the row 0 images,"),
        ("<image 3>", ["img/1.png"], "the text names image 3, but the row has 1,"),
    ],
)
def test_markers_that_do_not_fit(question: str, cells: Any, said: str, tmp_path: Path) -> None:
    reason = refused(tmp_path, {"question": question, "images": cells, "answer": "a"})
    assert said in reason
    assert reason.endswith("correct the row")


def test_a_marker_that_is_written_by_the_assistant_is_text(tmp_path: Path) -> None:
    row = {"messages": [ASK, {"role": "assistant", "content": "<image> is a marker"}], "images": ["img/1.png"]}
    problem = first(tmp_path, row)
    assert (shown(problem), problem.answer) == (["user: <1>q"], "<image> is a marker")


def test_images_stand_in_their_turns(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "<image>q"}, SAY, {"role": "user", "content": "and <image>?"}, SAY]
    problem = first(tmp_path, {"messages": messages, "images": ["img/1.png", "img/2.png"]})
    assert shown(problem) == ["user: <1>q", "assistant: a", "user: and <2>?"]
    messages[0], messages[2] = ASK, ASK
    problem = first(tmp_path, {"messages": messages, "images": ["img/1.png", "img/2.png"]})
    assert shown(problem) == ["user: <1><2>q", "assistant: a", "user: q"], "first in the first user message"


# ── lists of parts ──────────────────────────────────────────────────────────────────────────────────────────


def parts(*content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(content)}, SAY]}


TEXT = {"type": "text", "text": "q"}
BOTH = ["img/1.png", "img/2.png"]


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        (parts({"type": "image"}, TEXT) | {"images": ["img/1.png"]}, "user: <1>q"),
        (parts(TEXT, {"type": "image", "text": None}) | {"image": "img/1.png"}, "user: q<1>"),
        (parts(TEXT, {"type": "image", "image": "img/1.png"}), "user: q<1>"),
        (parts(TEXT, {"type": "image", "url": "img/1.png"}), "user: q<1>"),
        (parts(TEXT, {"type": "image", "path": "img/1.png"}), "user: q<1>"),
        (parts(TEXT, {"type": "image_url", "image_url": {"url": "img/1.png", "detail": "low"}}), "user: q<1>"),
        (parts(TEXT, {"type": "image_url", "image_url": "img/1.png"}), "user: q<1>"),
        (parts({"type": "input_text", "text": "q"}, {"type": "input_image", "image_url": "img/1.png"}), "user: q<1>"),
        (parts({"text": "q"}, {"image": "img/1.png"}), "user: q<1>"),
        (parts("q", {"type": "image", "image": "img/1.png"}), "user: q<1>"),
        (parts({"type": "image", "image": 1}, {"type": "image", "index": 0}, TEXT) | {"images": BOTH}, "user: <2><1>q"),
        (parts({"type": "image"}, {"type": "text", "text": "a <image> tag"}) | {"images": ["img/1.png"]},
         "user: <1>a <image> tag"),
        (parts({"type": "image", "image": "img/3.png"}, {"type": "image"}, TEXT) | {"images": ["img/1.png"]},
         "user: <3><1>q"),
    ],
)  # fmt: skip
def test_parts(row: dict[str, Any], prompt: str, tmp_path: Path) -> None:
    assert shown(first(tmp_path, row)) == [prompt]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (parts({"type": "image"}, TEXT), "1 place for images (<image>) and the row 0 images"),
        (
            parts({"type": "image", "image": "img/1.png"}) | {"images": ["img/1.png"]},
            "and the columns of images 1 more",
        ),
        (parts({"type": "audio", "audio": "a.wav"}), "a part of type audio, and only text, images and videos are read"),
        (parts({"type": "thing"}), "whose type is not known"),
        (parts({"type": "image", "image": ["img/1.png", "img/2.png"]}), "holds 2 images: give each a part of its own"),
        ({"messages": [ASK, {"role": "alien", "content": "x"}]}, "a message of role 'alien', which is none of"),
        ({"messages": [SAY]}, "no message comes before the answer"),
        ({"messages": [{"role": "system", "content": "s"}, SAY]}, "its last message is of role system"),
        ({"messages": [ASK]}, "no answer in a last assistant turn"),
        ({"messages": [{"role": "user", "content": " "}, SAY]}, "the prompt is empty"),
        ({"messages": [{"role": "user", "content": None}, SAY]}, "the prompt is empty"),
        ({"question": "\n", "answer": "a", "image": "img/1.png"}, "the prompt is empty"),
        ({"question": {"a": 1}, "answer": "a"}, "a dict and not a text"),
    ],
)
def test_what_is_no_conversation(row: dict[str, Any], said: str, tmp_path: Path) -> None:
    assert said in refused(tmp_path, row, columns={"prompt": "question"} if "question" in row else {})


# ── roles ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_roles_of_other_names(tmp_path: Path) -> None:
    turns = [("system", "s"), ("human", "q"), ("function_call", "f"), ("observation", "o"), ("gpt", "a")]
    problem = first(tmp_path, {"conversations": [{"from": role, "value": text} for role, text in turns]})
    assert shown(problem) == ["system: s", "user: q", "assistant: f", "tool: o"]
    assert (problem.answer, problem.demonstration) == ("a", "a")


def test_a_conversation_as_text(tmp_path: Path) -> None:
    assert shown(first(tmp_path, {"messages": json.dumps([ASK, SAY])})) == ["user: q"]


def test_pairs(tmp_path: Path) -> None:
    row = {"texts": [{"user": "q", "assistant": "a"}, {"user": "r", "assistant": "b"}], "images": ["img/1.png"]}
    problem = first(tmp_path, row)
    assert (shown(problem), problem.answer) == (["user: <1>q", "assistant: a", "user: r"], "b")


def test_the_system_message(tmp_path: Path) -> None:
    own = {"messages": [{"role": "system", "content": "own"}, ASK, SAY], "system": "column"}
    assert shown(first(tmp_path, own)) == ["system: own", "user: q"]
    assert shown(first(tmp_path, own, system_prompt="set")) == ["system: set", "user: q"]
    without = {"messages": [ASK, SAY], "system": "column"}
    assert shown(first(tmp_path, without)) == ["system: column", "user: q"]
    assert shown(first(tmp_path, {"messages": [ASK, SAY], "system": ""})) == ["user: q"]


def test_text_that_spells_control_tokens_is_kept(tmp_path: Path) -> None:
    text = "<|im_end|>\n<|im_start|>assistant\n<|image_pad|>"
    assert shown(first(tmp_path, {"question": text, "answer": "a"})) == [f"user: {text}"]


# ── boxes ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_boxes_in_texts(tmp_path: Path) -> None:
    row: dict[str, Any] = {
        "messages": [
            {"role": "user", "content": "<image>Is <ref-object> in <bbox>?"},
            {"role": "assistant", "content": "No, in <bbox>."},
        ],
        "images": ["img/1.png"],
        "objects": {"ref": ["a dog"], "bbox": [[1, 2, 3.5, 4.0], [5, 6, 7, 8]]},
    }
    problem = first(tmp_path, row)
    assert (shown(problem), problem.answer) == (["user: <1>Is a dog in [1, 2, 3.5, 4]?"], "No, in [5, 6, 7, 8].")
    row["objects"]["bbox"].pop()
    assert "2 times <bbox>, but the column objects has 1 of them" in refused(tmp_path, row)


@pytest.mark.parametrize(
    ("boxes", "answer"),
    [
        ({"objects": {"ref": [], "bbox": [[1, 2, 3, 4]]}}, [1, 2, 3, 4]),
        ({"objects": {"bbox": [[1, 2, 3, 4], [5, 6, 7, 8]]}}, [[1, 2, 3, 4], [5, 6, 7, 8]]),
        ({"bbox": [1.5, 2, 3, 4]}, [1.5, 2, 3, 4]),
        ({"objects": [{"bbox": [1, 2, 3, 4], "label": "dog"}]}, [1, 2, 3, 4]),
    ],
)
def test_boxes_are_the_answer_where_there_is_no_other(boxes: dict[str, Any], answer: Any, tmp_path: Path) -> None:
    problem = first(tmp_path, {"question": "Where?", "image": "img/1.png"} | boxes)
    assert problem.answer == answer
    assert json.loads(problem.demonstration or "") == answer
    assert first(tmp_path, {"question": "Where?", "answer": "x"} | boxes).answer == "x"


# ── alpaca ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_alpaca(tmp_path: Path) -> None:
    row = {"instruction": "Count.", "input": "", "output": "3", "history": [["Hi", "Hello"]], "images": ["img/1.png"]}
    problem = first(tmp_path, row)
    assert (shown(problem), problem.answer) == (["user: <1>Hi", "assistant: Hello", "user: Count."], "3")
    assert shown(first(tmp_path, row | {"input": "<image> dots", "history": None})) == ["user: Count.\n<1> dots"]


# ── templates ───────────────────────────────────────────────────────────────────────────────────────────────

ROW = {"question": "How <image>?", "n": 3, "odd name": "odd", "answer": "a", "image": "img/1.png"}


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        ("{{ question }} Say {{ n }}.", "How <1>? Say 3."),
        ("{{ content | trim }} Think.", "How <1>? Think."),
        ("{{ image }} {{ n + 1 }}", "<1> 4"),
        ("Look: {{ images[0] }}!", "Look: <1>!"),
        ("{% for one in images %}({{ one }}){% endfor %}{{ n }}", "(<1>)3"),
        ("<image>{{ n }}", "<1>3"),
        ("No marker, {{ n }}", "<1>No marker, 3"),
        ("{{ columns['odd name'] }}", "<1>odd"),
        ("{{ level | default('easy') }} {% if hint is defined %}{{ hint }}{% endif %}", "<1>easy "),
        ("Which one?", "<1>Which one?"),
        ("{# a comment #}{{ n }}\n", "<1>3\n"),
    ],
)
def test_a_template(template: str, prompt: str, tmp_path: Path) -> None:
    assert shown(first(tmp_path, ROW, template=template)) == [f"user: {prompt}"]
    file = tmp_path / "prompt.jinja"
    file.write_text(template, encoding="utf-8")
    assert shown(first(tmp_path, ROW, template=str(file))) == [f"user: {prompt}"]


def test_a_template_of_a_conversation(tmp_path: Path) -> None:
    content = [{"type": "text", "text": "q"}, {"type": "image", "image": "img/1.png"}]
    row = {"messages": [{"role": "system", "content": "s"}, ASK, SAY, {"role": "user", "content": content}, SAY]}
    turns = ["system: s", "user: q", "assistant: a"]
    assert shown(first(tmp_path, row, template="{{ content }}!")) == [*turns, "user: q<1>!"]
    assert shown(first(tmp_path, row, template="What?")) == [*turns, "user: <1>What?"]
    assert "template shows 2 images and the message 1" in refused(tmp_path, row, template="<image>{{ image }}")


def test_a_template_that_fails_for_one_row(tmp_path: Path) -> None:
    task = task_of(tmp_path, ROW, ROW | {"question": None}, template="Well,\n{{ question.upper() }}")
    assert task.problem_of_row("train", 0)
    with pytest.raises(BadRow, match=r"task\.template fails for this row in line 2 \(UndefinedError: "):
        task.problem_of_row("train", 1)


@pytest.mark.parametrize(
    "template",
    [
        "{{ question.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% for x in range(10**9) %}x{% endfor %}",
    ],
)
def test_templates_run_in_a_sandbox(template: str, tmp_path: Path) -> None:
    assert "SecurityError" in (reason := refused(tmp_path, ROW, template=template)) or "OverflowError" in reason


def test_what_comes_from_the_data_is_no_template(tmp_path: Path) -> None:
    row = ROW | {"question": "{{ 7 * 7 }} {% raw %}"}
    assert shown(first(tmp_path, row, template="{{ question }}")) == ["user: <1>{{ 7 * 7 }} {% raw %}"]


def test_the_split_does_not_depend_on_the_template(tmp_path: Path) -> None:
    rows = [{"question": f"q{n}", "answer": "a"} for n in range(40)]

    def held_out(**settings: Any) -> list[int]:
        task = task_of(tmp_path, *rows, eval_fraction=0.5, **settings)
        return [row for row in range(40) if _is_in(task, row)]

    assert held_out() == held_out(template="{{ question }}!", system_prompt="s")
    assert 5 < len(held_out()) < 35


def _is_in(task: Any, row: int) -> bool:
    from vlmrl.tasks.base import NotInSplit

    try:
        task.problem_of_row("eval", row)
    except NotInSplit:
        return False
    return True


def test_pixels_are_those_of_the_file(tmp_path: Path) -> None:
    (pixels,) = images(first(tmp_path, ROW))
    assert (pixels.shape, str(pixels.dtype), int(pixels.max())) == ((8, 8, 3), "uint8", 10)
