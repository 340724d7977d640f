"""Which column plays which part, and what the values mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support.row_files import first, shown, task_of
from vlmrl.errors import ConfigError
from vlmrl.tasks.base import BadRow


def roles(folder: Path, *rows: dict[str, Any], **settings: Any) -> dict[str, str]:
    return task_of(folder, *rows, **settings).data_table()


# ── recognition ─────────────────────────────────────────────────────────────────────────────────────────────


def test_every_role_is_said_with_its_type(tmp_path: Path) -> None:
    row = {"id": 3, "question": "q", "images": ["img/1.png"], "options": ["a", "b"], "answer": "A", "system": "s"}
    assert roles(tmp_path, row) == {
        "rows": f"1 of {tmp_path / 'rows.jsonl'}",
        "prompt": "question (text)",
        "system": "system (text)",
        "images": "images (list of text)",
        "choices": "options (list of text)",
        "answer": "answer (text)",
        "evaluation": "0% of the rows, by their texts and pixels",
    }


def test_names_in_other_spellings(tmp_path: Path) -> None:
    problem = first(tmp_path, {"Question": "q", "Ground-Truth": "a", "IMAGE": "img/1.png"})
    assert (shown(problem), problem.answer) == (["user: <1>q"], "a")


def test_what_is_passed_over_is_said(tmp_path: Path) -> None:
    row = {"question": "q", "problem": "<image> q", "image": "img/1.png", "images": ["img/1.png"], "answer": "A"}
    found = roles(tmp_path, row)
    assert found["prompt"] == "question (text); not problem"
    assert found["images"] == "images (list of text); not image"


@pytest.mark.parametrize(
    ("row", "key", "evidence"),
    [
        ({"question": "q", "problem": "r", "answer": "a"}, "prompt", r"row 0 has 'q' and 'r'"),
        ({"question": "q", "answer": "4", "ground_truth": "5"}, "answer", "row 0 has '4' and '5'"),
        ({"question": "q", "answer": "4", "solution": "<answer> 5 </answer>"}, "answer", "row 0 has '4' and"),
        (
            {"question": "q", "answer": "a", "image": "img/1.png", "images": ["img/2.png"]},
            "images",
            "they show other pixels",
        ),
        (
            {"messages": [{"role": "user", "content": "q"}], "conversations": [{"from": "human", "value": "r"}]},
            "messages",
            "row 0 has",
        ),
    ],
)
def test_two_readings_are_refused_where_they_differ(
    row: dict[str, Any], key: str, evidence: str, tmp_path: Path
) -> None:
    with pytest.raises(
        ConfigError, match=rf"task\.columns\.{key} can be .* which differ \({evidence}.*: set task"
    ) as no:
        task_of(tmp_path, row)
    chosen = str(no.value).rpartition("=")[2]
    assert task_of(tmp_path, row, columns={key: chosen}), "the command that it names works"


@pytest.mark.parametrize(
    "row",
    [
        {"question": "q", "problem": " Q\n", "answer": "a"},
        {"question": "q", "answer": "4", "ground_truth": 4},
        {"question": "q", "answer": "4", "solution": "<think>2 + 2</think><answer>4</answer>"},
        {
            "question": "q",
            "answer": "4",
            "solution": "Two and two are what one gets by counting, so it is 5.",
        },
        {"question": "q", "answers": ["4", "four"], "answer": "four"},
        {"question": "q", "answer": "4", "ground_truth": None},
        {"question": "q", "reward_model": {"ground_truth": "4"}, "answer": "5"},
    ],
)
def test_two_readings_that_agree(row: dict[str, Any], tmp_path: Path) -> None:
    assert first(tmp_path, row).messages


def test_equal_pixels_in_two_columns(tmp_path: Path) -> None:
    import base64

    from support.row_files import png

    again = base64.b64encode(png(10)).decode()
    problem = first(tmp_path, {"question": "q", "answer": "a", "images": ["img/1.png"], "image": again})
    assert shown(problem) == ["user: <1>q"]


def test_a_column_that_is_set(tmp_path: Path) -> None:
    row = {"q": "q", "truth": {"value": "7", "unit": "cm"}, "shown": [{"file": "img/1.png"}], "answer": "5"}
    problem = first(tmp_path, row, columns={"prompt": "q", "answer": "truth.value", "images": "shown.file"})
    assert (shown(problem), problem.answer) == (["user: <1>q"], "7")
    problem = first(tmp_path, row, columns={"prompt": "q", "images": []})
    assert (shown(problem), problem.answer) == (["user: q"], "5")
    problem = first(
        tmp_path, {"q": "q", "a": "img/1.png", "b": "img/2.png"}, columns={"prompt": "q", "images": ["b", "a"]}
    )
    assert shown(problem) == ["user: <2><1>q"]


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"answer": "anser"}, r"columns\.answer=anser: there is no such column, .* did you mean answer\?"),
        ({"answer": "reward_model.truth"}, r"did you mean .*reward_model\.ground_truth"),
        ({"images": ["image", "imag"]}, r"columns\.images=imag: .* did you mean image"),
        ({"prompt": "x"}, "The columns are question|the columns are question, answer"),
    ],
)
def test_a_column_that_does_not_exist(columns: dict[str, Any], said: str, tmp_path: Path) -> None:
    row = {"question": "q", "answer": "a", "image": "img/1.png", "reward_model": {"ground_truth": "7"}}
    with pytest.raises(ConfigError, match=said):
        task_of(tmp_path, row, columns=columns)


def test_nothing_to_ask(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the columns are a, b: set task\.columns\.prompt or task\.template"):
        task_of(tmp_path, {"a": "x", "b": "y"})
    problem = first(tmp_path, {"image": "img/1.png", "label": 7}, system_prompt="Name the digit.")
    assert (shown(problem), problem.answer) == (["system: Name the digit.", "user: <1>"], 7)


# ── answers ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("cell", "answer"),
    [
        (" 7 ", "7"),
        (7, 7),
        (0, 0),
        (False, False),
        (2.5, 2.5),
        ("<answer> 3 </answer>", "3"),
        ("<think>\nlong\n</think>\n\n<answer>no</answer>", "no"),
        ("$\\boxed{\\frac{1}{2}}$", "\\frac{1}{2}"),
        ("\\boxed{1} and \\boxed{2}", "\\boxed{1} and \\boxed{2}"),
        (["a", "b", None], ["a", "b"]),
        ([1, 2, 3, 4], [1, 2, 3, 4]),
        ([[1, 2, 3, 4], [5, 6, 7, 8]], [[1, 2, 3, 4], [5, 6, 7, 8]]),
        ([{"answer": "cat", "answer_id": 1}], ["cat"]),
        ([{"role": "assistant", "content": "cat"}], "cat"),
        ({"x": 1}, {"x": 1}),
    ],
)
def test_an_answer(cell: Any, answer: Any, tmp_path: Path) -> None:
    problem = first(tmp_path, {"question": "q", "answer": cell})
    assert problem.answer == answer
    assert type(problem.answer) is type(answer)


@pytest.mark.parametrize("cell", [None, "", " \n", [], [None], [""], {}, {"x": None}])
def test_no_answer(cell: Any, tmp_path: Path) -> None:
    task = task_of(tmp_path, {"question": "q", "answer": "a"}, {"question": "q", "answer": cell}, {"question": "r"})
    assert task.problem_of_row("train", 0).answer == "a"
    for row in (1, 2):
        with pytest.raises(
            BadRow, match="the row has no answer in the column answer, so it cannot be scored: fill it"
        ) as no:
            task.problem_of_row("train", row)
        assert (no.value.source, no.value.row) == ("rows.jsonl", row)


def test_a_data_set_without_answers(tmp_path: Path) -> None:
    assert first(tmp_path, {"question": "q"}).answer is None, "a format reward needs none"


# ── choices ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("row", "letter"),
    [
        ({"choices": ["red", "blue"], "answer": 1}, "B"),
        ({"choices": ["red", "blue"], "answer": "1"}, "B"),
        ({"choices": ["red", "blue"], "answer": 1.0}, "B"),
        ({"choices": ["red", "blue"], "answer": "B"}, "B"),
        ({"choices": ["red", "blue"], "answer": "(b)."}, "B"),
        ({"choices": ["red", "blue"], "answer": "Blue"}, "B"),
        ({"choices": ["red", "blue"], "answer": "<answer> B </answer>"}, "B"),
        ({"options": "['red', 'blue']", "answer": "B"}, "B"),
        ({"options": ["A. red", "B. blue"], "answer": "B. blue"}, "B"),
        ({"choices": {"label": ["A", "B"], "text": ["red", "blue"]}, "answerKey": "B"}, "B"),
        ({"A": "red", "B": "blue", "C": None, "answer": "B"}, "B"),
        ({"option_a": "red", "option_b": "blue", "answer": "B"}, "B"),
        ({"choices": ["red", "blue"], "correct_choice_idx": 1}, "B"),
    ],
)
def test_a_choice(row: dict[str, Any], letter: str, tmp_path: Path) -> None:
    problem = first(tmp_path, {"question": "Which?"} | row)
    assert shown(problem) == ["user: Which?\nA. red\nB. blue"]
    assert problem.answer == letter
    assert problem.columns["choices"] == ["red", "blue"]
    assert problem.demonstration == letter


def test_options_that_the_question_has(tmp_path: Path) -> None:
    problem = first(tmp_path, {"question": "Which?\n(A) red\n(B) blue", "choices": ["red", "blue"], "answer": 0})
    assert (shown(problem), problem.answer) == (["user: Which?\n(A) red\n(B) blue"], "A")


def test_options_are_switched_off(tmp_path: Path) -> None:
    row = {"question": "Which?", "choices": ["red", "blue"], "answer": "blue"}
    problem = first(tmp_path, row, columns={"choices": []})
    assert (shown(problem), problem.answer) == (["user: Which?"], "blue")


def test_options_that_count_from_one(tmp_path: Path) -> None:
    rows = [{"question": f"q{n}", "choices": ["a", "b"], "answer": n} for n in (1, 2)]
    task = task_of(tmp_path, *rows)
    assert [task.problem_of_row("train", row).answer for row in (0, 1)] == ["A", "B"]
    assert task.data_table()["choices"].endswith("; an answer that is a number counts them from 1")


@pytest.mark.parametrize("answer", ["green", 2, -1, "C", True, "AB"])
def test_an_answer_that_is_no_option(answer: Any, tmp_path: Path) -> None:
    task = task_of(tmp_path, {"question": "q", "choices": ["red", "blue"], "answer": 0}, {
        "question": "q", "choices": ["red", "blue"], "answer": answer,
    })  # fmt: skip
    with pytest.raises(BadRow, match=r"which is none of the 2 options, .* or set task\.columns\.choices=\[\]"):
        task.problem_of_row("train", 1)


# ── demonstrations ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"answer": "<answer> 3 </answer>"}, "<answer> 3 </answer>"),
        ({"answer": 3.0}, "3"),
        ({"answer": ["cat", "a cat"]}, "cat"),
        ({"answer": [{"answer": "cat"}]}, "cat"),
        ({"answer": [1.0, 2.5, 3, 4]}, "[1, 2.5, 3, 4]"),
        ({"completion": [{"role": "assistant", "content": "cat"}]}, "cat"),
    ],
)
def test_what_the_assistant_says(row: dict[str, Any], said: str, tmp_path: Path) -> None:
    assert first(tmp_path, {"question": "q"} | row).demonstration == said


def test_a_column_of_demonstrations(tmp_path: Path) -> None:
    row = {"question": "q", "answer": "4", "solution": "<think>2 + 2</think> 4"}
    problem = first(tmp_path, row, columns={"demonstration": "solution"})
    assert (problem.answer, problem.demonstration) == ("4", "<think>2 + 2</think> 4")
