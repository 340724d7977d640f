"""mode=preview finds what is wrong with data and rewards. Each fault has a twin without it, and no finding there."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from support.command_line import Ended, Home

pytestmark = pytest.mark.slow

QUESTION = "Which digit is this?"
ROWS = 40

TYPED = """
import io, sys
sys.stdin = io.StringIO(sys.argv.pop(1))
from vlmrl.cli.main import main
sys.exit(main())
"""
"""The command line, with a text on its standard input."""


@dataclass(frozen=True)
class Previewed:
    """A preview that ended."""

    ended: Ended
    folder: Path

    @property
    def content(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.folder / "preview.json").read_text())
        return content

    @property
    def codes(self) -> list[str]:
        return [finding["code"] for finding in self.content["findings"]]

    def text(self, code: str) -> str:
        (found,) = [finding["text"] for finding in self.content["findings"] if finding["code"] == code]
        return str(found)

    @property
    def page(self) -> str:
        return (self.folder / "preview.html").read_text()


class Desk:
    """A user's folder with data sets in it, and the preview of each."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self._count = 0

    def rows(self, change: Callable[[dict[str, Any], int], None] = lambda row, number: None) -> Path:
        """JSONL with pictures in a folder of its own; `change` edits each row."""
        self._count += 1
        folder = self.home.path / f"data{self._count}"
        (folder / "images").mkdir(parents=True)
        with (folder / "rows.jsonl").open("w") as file:
            for number in range(ROWS):
                noise = np.random.default_rng(number).integers(0, 256, (48, 64, 3), np.uint8)
                PIL.Image.fromarray(noise).save(folder / "images" / f"{number}.png")
                row: dict[str, Any] = {
                    "question": QUESTION,
                    "image": f"images/{number}.png",
                    "answer": str(number % 10),
                }
                change(row, number)
                file.write(json.dumps(row) + "\n")
        return folder / "rows.jsonl"

    def preview(self, path: Path, *arguments: str, typed: str | None = None) -> Previewed:
        self._count += 1
        folder = self.home.path / "outputs" / f"preview{self._count}"
        ended = self.home.vlmrl(
            *(() if typed is None else (typed,)),
            *("mode=preview", "model=qwen3vl_tiny", "task=dataset", f"task.path={path}", "preview.answers=0"),
            *(f"hydra.run.dir={folder}", "monitor.wandb.mode=disabled", *arguments),
            code=("-m", "vlmrl") if typed is None else ("-c", TYPED),
        )
        return Previewed(ended, folder)


@pytest.fixture(scope="module")
def desk(home: Home) -> Desk:
    return Desk(home)


@pytest.fixture(scope="module")
def sound(desk: Desk) -> Previewed:
    return desk.preview(desk.rows(), "reward=exact")


def test_sound_data_has_no_findings(sound: Previewed) -> None:
    assert sound.codes == []
    assert sound.ended.code == 0
    assert "<|im_start|>user" in sound.ended.out
    assert "<image: " in sound.ended.out
    assert sound.content["splits"]["train"]["rows"] == ROWS
    assert QUESTION in sound.page


def test_data_that_spells_a_control_token_is_told_apart_without_colors(desk: Desk, sound: Previewed) -> None:
    """Each printed prompt has one `<|im_end|>`, that of the user's turn, and one `<image: `."""
    path = desk.rows(lambda row, number: row.update(question=f"<|im_end|> or <image: 4 tokens, 2 × 2>? {QUESTION}"))
    shown = desk.preview(path, "reward=exact").ended.out
    for real in ("<|im_end|>", "<image: "):
        assert shown.count(real) == sound.ended.out.count(real) > 0
    assert r"<\|im_end|> or <\image: 4 tokens, 2 × 2>?" in shown
    assert "a backslash marks text of the data" in shown
    assert "a backslash marks" not in sound.ended.out


def test_a_wrong_image_root_is_found_with_the_right_one(desk: Desk) -> None:
    path = desk.rows()
    wrong = desk.preview(path, "reward=exact", f"task.image_root={path.parent / 'images'}")
    assert "images_missing" in wrong.codes
    assert f"task.image_root={path.parent}" in wrong.text("images_missing")
    assert wrong.ended.code == 1
    assert desk.preview(path, "reward=exact", f"task.image_root={path.parent}").codes == []


def test_rows_that_are_all_bad_are_one_finding(desk: Desk) -> None:
    path = desk.rows(lambda row, number: row.update(question="<image> and <image>"))
    found = desk.preview(path, "reward=exact")
    assert found.codes == ["no_problems"]
    assert "train" in found.text("no_problems")


def test_images_in_another_folder_are_found(desk: Desk) -> None:
    path = desk.rows()
    (path.parent / "images").rename(path.parent / "pictures")
    (path.parent / "extracted").mkdir()
    (path.parent / "pictures").rename(path.parent / "extracted" / "images")
    wrong = desk.preview(path, "reward=exact")
    assert f"task.image_root={path.parent / 'extracted'}" in wrong.text("images_missing")


@pytest.mark.parametrize(
    ("answer", "extract", "twin"),
    [
        pytest.param("{}", "boxed", ("reward.extract.kind=whole",), id="plain answers, boxed wanted"),
        pytest.param(
            "{}",
            "tag",
            ("reward.extract.kind=tag", "task.system_prompt=Answer in <answer> </answer>."),
            id="plain answers, a tag wanted and asked for",
        ),
        pytest.param("<answer>{}</answer>", "boxed", ("reward.extract.kind=tag",), id="answers in a tag, a box wanted"),
    ],
)
def test_answers_of_another_form_are_found(desk: Desk, answer: str, extract: str, twin: tuple[str, ...]) -> None:
    path = desk.rows(lambda row, number: row.update(answer=answer.format(number % 10)))
    wrong = desk.preview(path, "reward=exact", f"reward.extract.kind={extract}")
    assert wrong.codes == ["answer_form"]
    assert wrong.ended.code == 1
    assert desk.preview(path, "reward=exact", *twin).codes == []


def test_a_reward_that_never_gives_1_is_found(desk: Desk) -> None:
    path = desk.rows()
    module = path.parent / "scores.py"
    module.write_text(
        "def half(attempt):\n    return 0.5 * (attempt.answer == attempt.reference)\n"
        "def whole(attempt):\n    return float(attempt.answer == attempt.reference)\n"
        "def generous(attempt):\n    return 1.0\n"
        "def broken(attempt):\n    raise ValueError('no')\n"
    )
    assert desk.preview(path, f"reward={module}:half").codes == ["reward_max"]
    assert desk.preview(path, f"reward={module}:generous").codes == ["reward_empty"]
    assert "reward_fails" in desk.preview(path, f"reward={module}:broken").codes
    assert desk.preview(path, f"reward={module}:whole").codes == []


def test_references_that_no_answer_can_match_are_found(desk: Desk) -> None:
    path = desk.rows(lambda row, number: row.update(answer=("cats", "dogs", "birds")[number % 3]))
    assert "reward_max" in desk.preview(path, "reward=number").codes
    numbers = desk.rows(lambda row, number: row.update(answer=f"{number} cm"))
    assert desk.preview(numbers, "reward=number").codes == []


def test_long_prompts_and_answers_are_found(desk: Desk) -> None:
    path = desk.rows(lambda row, number: row.update(question="word " * 300 + QUESTION) if number % 4 == 0 else None)
    long = desk.preview(path, "reward=exact", "trainer.seq_len=256")
    assert long.codes == ["prompt_too_long"]
    assert "trainer.seq_len=256" in long.text("prompt_too_long")
    assert desk.preview(path, "reward=exact", "trainer.seq_len=4096", "inference.max_model_len=4096").codes == []
    answers = desk.rows(lambda row, number: row.update(answer=f"{'long ' * 100}{number}"))
    assert desk.preview(answers, "reward=exact").codes == ["answer_too_long"]
    assert desk.preview(answers, "reward=exact", "orchestrator.max_new_tokens=700").codes == []


@pytest.mark.parametrize(
    ("box", "space"),
    [
        pytest.param([0.1, 0.2, 0.7, 0.9], "relative", id="shares"),
        pytest.param([100, 200, 700, 900], "thousand", id="thousandths"),
    ],
)
def test_boxes_in_the_wrong_space_are_found(desk: Desk, box: list[float], space: str) -> None:
    path = desk.rows(lambda row, number: row.update(answer=box))
    wrong = desk.preview(path, "reward=iou", "orchestrator.max_new_tokens=200")
    assert "box_space" in wrong.codes
    assert f"reference_space={space}" in wrong.text("box_space")
    settings = (f"reward.terms.iou.reference_space={space}", f"reward.terms.iou.answer_space={space}")
    right = desk.preview(path, "reward=iou", "orchestrator.max_new_tokens=200", *settings)
    assert "box_space" not in right.codes


def test_boxes_of_the_resized_image_are_found(desk: Desk) -> None:
    """A picture of 48 x 32 pixels that the model sees as 96 x 64 or so: boxes beyond its edge are of the latter."""
    inside = desk.rows(lambda row, number: row.update(answer=[3, 4, 30 + number % 10, 40]))
    assert "box_space" not in desk.preview(inside, "reward=iou", "orchestrator.max_new_tokens=200").codes
    beyond = desk.rows(lambda row, number: row.update(answer=[3, 4, 80 + number % 10, 70]))
    assert "box_space" in desk.preview(beyond, "reward=iou", "orchestrator.max_new_tokens=200").codes


def test_pictures_that_no_prompt_shows_are_found(desk: Desk) -> None:
    path = desk.rows(lambda row, number: row.update(question=f"{number}. {QUESTION}"))
    assert desk.preview(path, "reward=exact", "task.columns.images=[]").codes == ["no_images"]
    path.write_text(path.read_text().replace('"image"', '"number"'))
    assert desk.preview(path, "reward=exact").codes == []


def test_copies_and_leaks_are_found_in_the_whole_data(desk: Desk) -> None:
    path = desk.rows()
    other = desk.rows()
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:20] * 2) + "\n")
    found = desk.preview(path, "reward=exact", "full=true", f"task.eval_path={other}")
    assert found.codes == ["duplicates", "leak"]
    assert found.content["splits"]["train"] | {"is_whole": True} == found.content["splits"]["train"]
    assert found.content["splits"]["train"]["different"]["texts_and_pixels"] == 20
    assert found.content["shared"]["texts_and_pixels"] == 20
    assert found.content["splits"]["train"]["different"]["texts"] == 1


def test_one_row_is_shown_and_typed_answers_are_scored(desk: Desk) -> None:
    path = desk.rows(lambda row, number: row.update(question="<script>alert(1)</script> " + QUESTION))
    shown = desk.preview(path, "reward=exact", "row=17", typed="7\\n\n8\n")
    assert shown.ended.code == 0, shown.ended.err
    assert "rows.jsonl:17:" in shown.ended.out
    assert shown.ended.out.splitlines()[-2:] == ["exact 1", "exact 0"]
    assert "<script>" not in shown.page
    assert shown.page.count('src="data:image/png') == 2  # as the row has it, and as the model sees it
    none = desk.preview(path, "reward=exact", f"row={ROWS}")
    assert none.ended.code == 2
    assert f"row={ROWS} does not exist" in none.ended.err


def test_a_task_that_scores_itself_is_previewed(desk: Desk) -> None:
    folder = desk.home.path / "outputs" / "colors"
    ended = desk.home.vlmrl(
        *("mode=preview", "preview.problems=20", f"hydra.run.dir={folder}", "monitor.wandb.mode=disabled"),
    )
    assert ended.code == 0, ended.out + ended.err
    assert "the task's own reward: reference 1, empty answer 0" in ended.out
    assert "now: " in ended.out  # the model's answers


def test_the_whole_of_an_endless_task_is_refused(desk: Desk) -> None:
    ended = desk.home.vlmrl("mode=preview", "full=true", "preview.answers=0", "monitor.wandb.mode=disabled")
    assert ended.code == 2
    assert "preview.problems" in ended.err


def test_row_and_full_belong_to_the_preview(desk: Desk) -> None:
    for argument in ("row=3", "full=true"):
        ended = desk.home.vlmrl(argument, "dry_run=true")
        assert ended.code == 2
        assert "mode=preview" in ended.err
