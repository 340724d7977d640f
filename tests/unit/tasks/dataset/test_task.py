"""tasks/dataset/task.py: which rows are held out, their order, other images, random answers, and rows that are bad."""

from __future__ import annotations

import io
import json
import math
import random
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image as PILImage

from support.row_files import images, png, shown, task_of, written
from vlmrl.config.dataset import DatasetConfig
from vlmrl.errors import ConfigError
from vlmrl.tasks.base import BadRow, NotInSplit, Split
from vlmrl.tasks.dataset.task import DatasetTask

SPLITS: tuple[Split, ...] = ("train", "eval")
COUNT = 60


def task_at(path: Path, *, seed: int = 0, **settings: Any) -> DatasetTask:
    return DatasetTask(DatasetConfig(path=str(path), **({"eval_fraction": 0.4} | settings)), seed=seed)


def rows_of(task: DatasetTask, split: Split) -> set[int]:
    """The rows that a split has."""
    found = set()
    for row in range(task.num_rows(split)):
        try:
            task.problem_of_row(split, row)
        except NotInSplit:
            continue
        found.add(row)
    return found


def asked(task: DatasetTask, split: Split) -> list[str]:
    """The prompts of a split, in the order of its rows."""
    return ["|".join(shown(task.problem_of_row(split, row))) for row in sorted(rows_of(task, split))]


def drawn(task: DatasetTask, split: Split, first: int, end: int) -> list[int]:
    """The rows of the indices that have a problem."""
    found = []
    for index in range(first, end):
        try:
            found.append(task.problem(split, index).row)
        except NotInSplit:
            continue
    return found


def questions(count: int = COUNT) -> list[dict[str, Any]]:
    return [{"question": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(count)]


def numbered_pictures(folder: Path, count: int) -> Path:
    """Rows with one question and a picture each, whose shade is the row's number."""
    (folder / "shades").mkdir()
    for n in range(count):
        (folder / f"shades/{n}.png").write_bytes(png(n))
    return written(folder, ({"question": "Which?", "image": f"shades/{n}.png", "answer": str(n)} for n in range(count)))


# ── membership ──────────────────────────────────────────────────────────────────────────────────────────────


def test_each_row_is_in_one_split_and_every_seed_agrees(tmp_path: Path) -> None:
    path = written(tmp_path, questions())
    held_out = [rows_of(task_at(path, seed=seed), "eval") for seed in (0, 1, 12345)]
    trained = [rows_of(task_at(path, seed=seed), "train") for seed in (0, 1, 12345)]
    assert held_out[0] == held_out[1] == held_out[2]
    assert trained[0] == trained[1] == trained[2] == set(range(COUNT)) - held_out[0]
    assert 10 < len(held_out[0]) < 40


def test_a_row_is_found_in_its_split_whichever_was_asked_first(tmp_path: Path) -> None:
    """What is remembered of one draw must not change the next."""
    path = written(tmp_path, questions())
    task = task_at(path)
    both = [[rows_of(task, split) for split in order] for order in (("train", "eval"), ("eval", "train"))]
    assert both[0] == both[1][::-1] == [rows_of(task_at(path), split) for split in SPLITS]


def test_duplicates_never_leak(tmp_path: Path) -> None:
    """Copies that differ in the answer, in white space, in the spelling of the path and in how the image is packed."""
    (tmp_path / "copies").mkdir()
    lines: list[dict[str, Any]] = []
    for n in range(30):
        (tmp_path / f"copies/{n}.png").write_bytes(png(8 * n))
        PILImage.open(io.BytesIO(png(8 * n))).save(tmp_path / f"copies/other {n}.bmp")
        lines += [
            {"question": "How many?", "image": f"copies/{n}.png", "answer": "1"},
            {"question": " How  many?\n", "image": f"./copies/../copies/{n}.png", "answer": "2"},
            {"question": "How many?", "image": f"copies/other {n}.bmp", "answer": "1"},
        ]
    random.Random(0).shuffle(lines)
    task = task_at(written(tmp_path, lines))

    def contents(split: Split) -> Counter[int]:
        return Counter(
            int(pixels[0, 0, 0]) for row in rows_of(task, split) for pixels in images(task.problem_of_row(split, row))
        )

    train, held_out = contents("train"), contents("eval")
    assert not set(train) & set(held_out)
    assert set((train + held_out).values()) == {3}
    assert train
    assert held_out


def test_rows_that_share_the_text_or_the_pixels_alone_are_on_both_sides(tmp_path: Path) -> None:
    one_picture = [line | {"image": "img/0.png"} for line in questions()]
    (tmp_path / "other").mkdir()
    for task in (task_at(written(tmp_path, one_picture)), task_at(numbered_pictures(tmp_path / "other", COUNT))):
        assert 10 < len(rows_of(task, "eval")) < 40


def test_paths_forms_and_folders_do_not_move_a_row(tmp_path: Path) -> None:
    """The same rows with paths, in another folder, under `image_root`, and as bytes in a Parquet file."""
    one, other = tmp_path / "one", tmp_path / "a/b"
    for folder in (one, other):
        folder.mkdir(parents=True)
    first = numbered_pictures(one, COUNT)
    second = numbered_pictures(other, COUNT)
    moved = tmp_path / "moved.jsonl"
    moved.write_text(first.read_text().replace("shades/", ""))
    packed = tmp_path / "packed.parquet"
    rows = [{"question": "Which?", "image": {"bytes": png(n), "path": None}, "answer": str(n)} for n in range(COUNT)]
    pq.write_table(pa.Table.from_pylist(rows), packed)
    tasks = (task_at(first), task_at(second), task_at(moved, image_root=str(one / "shades")), task_at(packed))
    held_out = [rows_of(task, "eval") for task in tasks]
    assert held_out[0] == held_out[1] == held_out[2] == held_out[3]
    assert 10 < len(held_out[0]) < 40


def test_the_order_and_the_company_of_rows_do_not_move_a_row(tmp_path: Path) -> None:
    lines = questions()
    shuffled = random.Random(1).sample(lines, len(lines))
    whole = task_at(written(tmp_path, lines))
    for name, some in {"shuffled": shuffled, "half": lines[::2], "reversed": lines[::-1]}.items():
        task = task_at(written(tmp_path, some, f"{name}.jsonl"))
        kept = {line["question"] for line in some}
        expected = {text for text in asked(whole, "eval") if text.removeprefix("user: ") in kept}
        assert set(asked(task, "eval")) == expected


def test_the_prompts_of_the_run_and_the_answers_do_not_move_a_row(tmp_path: Path) -> None:
    path = written(tmp_path, questions())
    others = written(tmp_path, (line | {"answer": "0", "note": "x"} for line in questions()), "others.jsonl")
    tasks = (
        task_at(path),
        task_at(path, system_prompt="Think.", template="Now: {{ question }}"),
        task_at(others),
        task_at(path, shuffle_images=True),
    )
    held_out = [rows_of(task, "eval") for task in tasks]
    assert all(rows == held_out[0] for rows in held_out)


# ── which rows each key holds out ───────────────────────────────────────────────────────────────────────────


def test_a_tenth_is_held_out_where_nothing_is_said(tmp_path: Path) -> None:
    task = task_at(written(tmp_path, questions(2000)), eval_fraction=None)
    assert abs(len(rows_of(task, "eval")) / 2000 - 0.1) < 4 * math.sqrt(0.09 / 2000)
    assert task.data_table()["evaluation"] == "10% of the rows, by their texts and pixels"


def test_a_fraction_of_zero_holds_nothing_out(tmp_path: Path) -> None:
    task = task_at(written(tmp_path, questions()), eval_fraction=0.0)
    assert rows_of(task, "train") == set(range(COUNT))
    assert rows_of(task, "eval") == set()


def test_eval_path_is_held_out_as_a_whole_and_train_is_whole(tmp_path: Path) -> None:
    path, other = written(tmp_path, questions()), written(tmp_path, questions(7), "test.jsonl")
    task = task_at(path, eval_path=str(other), eval_fraction=None)
    assert rows_of(task, "train") == set(range(COUNT))
    assert rows_of(task, "eval") == set(range(7))
    assert task.problem_of_row("eval", 3).source == "test.jsonl"
    assert task.data_table()["evaluation rows"].startswith("7 of ")


def test_eval_split_is_held_out_as_a_whole(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for name, count in {"train": COUNT, "test": 5}.items():
        pq.write_table(pa.Table.from_pylist(questions(count)), folder / f"{name}-00000-of-00001.parquet")
    task = task_at(folder, eval_split="test", eval_fraction=None)
    assert (len(rows_of(task, "train")), len(rows_of(task, "eval"))) == (COUNT, 5)


@pytest.mark.parametrize("key", ["eval_path", "eval_split"])
def test_two_ways_to_hold_rows_out(key: str, tmp_path: Path) -> None:
    path = written(tmp_path, questions())
    with pytest.raises(ConfigError, match=rf"^task\.eval_fraction=0\.4 and task\.{key} both say which rows"):
        DatasetTask(DatasetConfig(path=str(path), eval_fraction=0.4, **{key: str(path)}), seed=0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("0:5", range(5)),
        (":5", range(5)),
        ("50:", range(50, 60)),
        ("-3:", range(57, 60)),
        (":-55", range(5)),
        ("55:1000", range(55, 60)),
    ],
)
def test_ranges_of_rows_count_as_in_python(text: str, rows: range, tmp_path: Path) -> None:
    """A row keeps its number in the file: records, ids and messages name that."""
    task = task_at(written(tmp_path, questions()), rows=text, eval_fraction=0.0)
    found = [task.problem_of_row("train", row) for row in range(task.num_rows("train"))]
    assert [problem.row for problem in found] == list(rows)
    assert [problem.answer for problem in found] == [str(2 * n) for n in rows]
    assert [problem.id.split(":")[:2] for problem in found] == [["rows.jsonl", str(n)] for n in rows]


def test_a_range_does_not_move_a_row_to_the_other_split(tmp_path: Path) -> None:
    path = written(tmp_path, questions())
    held_out = {row for row in rows_of(task_at(path), "eval") if 20 <= row < 50}
    assert {20 + row for row in rows_of(task_at(path, rows="20:50"), "eval")} == held_out


@pytest.mark.parametrize("text", ["60:", "5:5", "10:3"])
def test_a_range_without_rows(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"task\.rows"):
        task_at(written(tmp_path, questions()), rows=text)


# ── order ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_epoch_has_each_training_row_once_in_an_order_of_its_own(tmp_path: Path) -> None:
    path = written(tmp_path, questions())
    epochs = {
        (seed, epoch): drawn(task_at(path, seed=seed), "train", epoch * COUNT, (epoch + 1) * COUNT)
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    members = sorted(rows_of(task_at(path), "train"))
    assert all(sorted(rows) == members for rows in epochs.values())
    assert len({tuple(rows) for rows in epochs.values()} | {tuple(members)}) == 5
    assert epochs[0, 0] == drawn(task_at(path), "train", 0, COUNT), "the seed alone decides"


def test_an_evaluation_has_the_order_of_the_file_whatever_the_seed(tmp_path: Path) -> None:
    path = written(tmp_path, questions())
    for seed in (0, 7):
        task = task_at(path, seed=seed)
        assert drawn(task, "eval", 0, COUNT) == sorted(rows_of(task, "eval")) == drawn(task, "eval", COUNT, 2 * COUNT)


# ── the blind control ───────────────────────────────────────────────────────────────────────────────────────


def test_no_row_shows_its_own_picture_and_texts_stay(tmp_path: Path) -> None:
    path = numbered_pictures(tmp_path, 200)
    task = task_at(path, shuffle_images=True, eval_fraction=0.0)
    plain = task_at(path, eval_fraction=0.0)
    own = [int(images(plain.problem_of_row("train", row))[0][0, 0, 0]) for row in range(200)]
    other = [int(images(task.problem_of_row("train", row))[0][0, 0, 0]) for row in range(200)]
    assert own == list(range(200))
    assert all(mine != theirs for mine, theirs in zip(own, other, strict=True))
    assert len(set(other)) > 100, "not a few pictures for all"
    again = task_at(path, shuffle_images=True, eval_fraction=0.0, seed=5)
    assert [int(images(again.problem_of_row("train", row))[0][0, 0, 0]) for row in range(200)] == other
    assert [task.problem_of_row("train", row).answer for row in range(200)] == [str(n) for n in range(200)]


@pytest.mark.parametrize("classes", [2, 5])
def test_the_picture_says_nothing_of_the_answer(classes: int, tmp_path: Path) -> None:
    """Rows of a class share one picture. Were equal pixels avoided, two classes could be told apart by the wrong
    picture; so the picture has to be independent of the row: Pearson's chi-squared over (answer, picture)."""
    count = 600
    lines = (
        {"question": "Which?", "image": f"img/{n % classes}.png", "answer": str(n % classes)} for n in range(count)
    )
    task = task_at(written(tmp_path, lines), shuffle_images=True, eval_fraction=0.0)
    table = Counter(
        (problem.answer, int(images(problem)[0][0, 0, 0]))
        for problem in (task.problem_of_row("train", row) for row in range(count))
    )
    answers = Counter({answer: sum(n for (a, _), n in table.items() if a == answer) for answer, _ in table})
    pictures = Counter({shade: sum(n for (_, s), n in table.items() if s == shade) for _, shade in table})
    expected = {(a, s): answers[a] * pictures[s] / count for a in answers for s in pictures}
    chi_squared = sum((table[cell] - mean) ** 2 / mean for cell, mean in expected.items())
    freedom = (classes - 1) ** 2
    assert len(pictures) == classes
    assert chi_squared < freedom + 4 * math.sqrt(2 * freedom)


def test_rows_show_as_many_pictures_as_before(tmp_path: Path) -> None:
    lines = [
        {"question": "Which?" + "<image>" * (n % 3), "images": [f"img/{(n + k) % 6}.png" for k in range(n % 3)]}
        | {"answer": str(n)}
        for n in range(24)
    ]
    task = task_at(written(tmp_path, lines), shuffle_images=True, eval_fraction=0.0)
    assert [len(images(task.problem_of_row("train", row))) for row in range(24)] == [n % 3 for n in range(24)]


def test_other_pictures_are_looked_for_among_rows_that_can_be_read(tmp_path: Path) -> None:
    lines = [{"question": "?", "image": f"img/{n}.png", "answer": "1"} for n in range(6)]
    missing = [{"question": "?", "image": f"img/none{n}.png", "answer": "1"} for n in range(6)]
    task = task_at(written(tmp_path, lines + missing), shuffle_images=True, eval_fraction=0.0)
    assert all(len(images(task.problem_of_row("train", row))) == 1 for row in range(6))


@pytest.mark.parametrize("split", SPLITS)
def test_a_row_without_any_other_picture_is_bad_in_its_split(split: Split, tmp_path: Path) -> None:
    """It is not said to belong to the other split, where no evaluation would ever miss it."""
    lines = [
        *questions(40),
        *({"question": f"{n}?", "image": [f"img/{n}.png"] * (n + 1), "answer": "1"} for n in range(6)),
    ]
    path = written(tmp_path, lines)
    mine = [row for row in rows_of(task_at(path), split) if row >= 40]
    task = task_at(path, shuffle_images=True)
    assert mine
    for row in mine:
        with pytest.raises(
            BadRow, match=r"none of 64 other rows has \d images, so task.shuffle_images has nothing"
        ) as bad:
            task.problem_of_row(split, row)
        assert (bad.value.source, bad.value.row) == ("rows.jsonl", row)


# ── random answers ──────────────────────────────────────────────────────────────────────────────────────────


def randomly(task: DatasetTask, draws: int = 400) -> list[str]:
    problem = task.problem("train", 0)
    found = []
    for seed in range(draws):
        *prompt, said = task.demonstration(problem, random_answers=True, seed=seed)
        assert tuple(prompt) == problem.messages
        assert said.role == "assistant"
        found.append("".join(part.text for part in said.content))  # type: ignore[union-attr]
    return found


def test_random_letters_are_those_of_the_options_and_independent_of_the_answer(tmp_path: Path) -> None:
    rows = [{"question": f"{n}?", "choices": ["red", "blue", "green"], "answer": 0} for n in range(20)]
    said = Counter(randomly(task_of(tmp_path, *rows)))
    assert set(said) == {"A", "B", "C"}
    assert max(said.values()) < 400 / 3 + 4 * math.sqrt(400 * 2 / 9)


def test_random_numbers_have_the_range_and_decimals_of_the_answers(tmp_path: Path) -> None:
    rows = [{"question": f"{n}?", "answer": f"{3 + 1.5 * n:.1f} cm"} for n in range(20)]
    said = randomly(task_of(tmp_path, *rows))
    values = [float(text.removesuffix(" cm")) for text in said]
    assert all(text.endswith(" cm") and text[:-3].partition(".")[2].isdecimal() for text in said)
    assert (min(values) >= 3.0, max(values) <= 31.5, len(set(said)) > 100) == (True, True, True)


def test_a_random_answer_depends_on_the_seed_alone(tmp_path: Path) -> None:
    task = task_of(tmp_path, *questions(20))
    one, other = task.problem_of_row("train", 3), task.problem_of_row("train", 11)
    for seed in range(20):
        said = [task.demonstration(each, random_answers=True, seed=seed)[-1] for each in (one, other)]
        assert said[0] == said[1]


def test_correct_demonstrations_say_the_answer(tmp_path: Path) -> None:
    task = task_of(tmp_path, *questions(20))
    for row in range(20):
        problem = task.problem_of_row("train", row)
        said = task.demonstration(problem, random_answers=False, seed=0)[-1]
        assert [part.text for part in said.content] == [problem.answer]  # type: ignore[union-attr]


def test_answers_without_a_form_have_no_random_ones(tmp_path: Path) -> None:
    task = task_of(tmp_path, *({"question": f"{n}?", "answer": f"{'ab' * n}: a story"} for n in range(20)))
    with pytest.raises(NotImplementedError, match=r"no letters of options.*trainer\.warmup\.demonstrations=correct"):
        task.demonstration(task.problem("train", 0), random_answers=True, seed=0)


# ── bad rows ────────────────────────────────────────────────────────────────────────────────────────────────

GOOD: dict[str, Any] = {"question": "Which?", "image": "img/1.png", "answer": "1"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (GOOD | {"answer": None}, r"the row has no answer in the column answer, so it cannot be scored"),
        (GOOD | {"answer": " "}, r"the row has no answer in the column answer"),
        (GOOD | {"image": "img/none.png"}, r"the image file .*none\.png does not exist: set task\.image_root"),
        (GOOD | {"image": "rows.jsonl"}, r"repair or remove the image"),
        (GOOD | {"image": "https://example.org/a.png"}, r"is a URL, and task\.fetch=false downloads nothing"),
        (GOOD | {"question": "<image> or <image>?"}, r"2 .*1 "),
    ],
)
def test_a_bad_row_says_where_it_stands_and_why(row: Mapping[str, Any], reason: str, tmp_path: Path) -> None:
    task = task_of(tmp_path, GOOD, GOOD | {"question": "And?"}, row)
    assert [task.problem_of_row("train", good).row for good in (0, 1)] == [0, 1]
    with pytest.raises(BadRow, match=reason) as bad:
        task.problem_of_row("train", 2)
    assert (bad.value.source, bad.value.row) == ("rows.jsonl", 2)


@pytest.mark.parametrize("line", ['{"question": "?", ', json.dumps(GOOD | {"image": "img/none.png"})])
def test_a_row_that_has_no_membership_is_reported_by_training_alone(line: str, tmp_path: Path) -> None:
    """Neither its text nor its pixels are known, so it must not count twice."""
    path = written(tmp_path, [GOOD] * 3)
    path.write_text(path.read_text() + line + "\n")
    task = task_at(path)
    with pytest.raises(NotInSplit):
        task.problem_of_row("eval", 3)
    with pytest.raises(BadRow) as bad:
        task.problem_of_row("train", 3)
    assert (bad.value.source, bad.value.row) == ("rows.jsonl", 3)


def test_a_bad_row_of_eval_path_is_reported_by_the_evaluation(tmp_path: Path) -> None:
    path = written(tmp_path, [GOOD] * 3)
    other = written(tmp_path, [GOOD, GOOD | {"answer": None}], "test.jsonl")
    task = task_at(path, eval_path=str(other), eval_fraction=None)
    with pytest.raises(BadRow, match="no answer") as bad:
        task.problem("eval", 1)
    assert (bad.value.source, bad.value.row) == ("test.jsonl", 1)
