"""The better and the worse answer of a row, in the forms in which data sets have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support.row_files import task_of
from vlmrl.tasks.base import BadRow, Preference
from vlmrl.tasks.border import TaskCodeError
from vlmrl.tasks.dataset.task import DatasetTask
from vlmrl.tasks.preferences import NoPreferencesError, get_preference
from vlmrl.types import Image, Message, Text

ASKED = [{"role": "user", "content": "Which colour?"}]


def said(text: str, role: str = "assistant") -> dict[str, str]:
    return {"role": role, "content": text}


FORMS: dict[str, dict[str, Any]] = {
    "texts": {"question": "Which colour?", "chosen": "red", "rejected": "blue"},
    "a message each": {"prompt": "Which colour?", "chosen": said("red"), "rejected": said("blue")},
    "prompt of messages": {"prompt": ASKED, "chosen": [said("red")], "rejected": [said("blue")]},
    "implicit prompt": {"chosen": [*ASKED, said("red")], "rejected": [*ASKED, said("blue")]},
    "prompt and whole conversations": {
        "prompt": "Which colour?",
        "chosen": [*ASKED, said("red")],
        "rejected": [*ASKED, said("blue")],
    },
    "ms-swift": {"messages": [*ASKED, said("red")], "rejected_response": "blue"},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "Which colour?"}],
        "chosen": {"from": "gpt", "value": "red"},
        "rejected": {"from": "gpt", "value": "blue"},
    },
}


def pair_of(task: DatasetTask, row: int = 0) -> Preference:
    return get_preference(task, task.problem_of_row("train", row))


def texts(*messages: Message) -> list[str]:
    return ["".join(part.text if isinstance(part, Text) else "<image>" for part in each.content) for each in messages]


@pytest.mark.parametrize("form", FORMS)
def test_a_form(form: str, tmp_path: Path) -> None:
    task = task_of(tmp_path, FORMS[form], FORMS[form])
    pair = pair_of(task)
    assert texts(*pair.prompt) == ["Which colour?"]
    assert texts(pair.chosen, pair.rejected) == ["red", "blue"]
    assert (pair.prompt[-1].role, pair.chosen.role, pair.rejected.role) == ("user", "assistant", "assistant")
    assert task.demonstration(task.problem_of_row("train", 0), random_answers=False, seed=0)[-1] == pair.chosen


def test_images_and_earlier_turns_belong_to_the_prompt(tmp_path: Path) -> None:
    earlier = [said("<image>And this?", "user"), said("round"), *ASKED]
    row = {"image": "img/1.png", "chosen": [*earlier, said("red")], "rejected": [*earlier, said("blue")]}
    pair = pair_of(task_of(tmp_path, row))
    assert texts(*pair.prompt) == ["<image>And this?", "round", "Which colour?"]
    assert isinstance(pair.prompt[0].content[0], Image)
    assert texts(pair.chosen, pair.rejected) == ["red", "blue"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"chosen": ""}, "chosen is empty"),
        ({"rejected": None}, "rejected is empty"),
        ({"rejected": "red"}, "both answers are equal"),
        ({"rejected": [*ASKED, said("Sure?", "user")]}, "does not end with what the assistant says"),
        ({"chosen": [said("How?", "user"), said("red")], "rejected": [*ASKED, said("no")]}, "differ before their last"),
    ],
)
def test_a_row_without_a_pair_is_bad(change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    good = FORMS["texts"]
    task = task_of(tmp_path, good | change, good)
    with pytest.raises(BadRow, match=f"rows.jsonl row 0: .*{reason}"):
        pair_of(task)
    assert texts(pair_of(task, 1).chosen) == ["red"], "the next row is used"
    assert task.problem_of_row("train", 0).messages, "in reinforcement learning its prompt can be played"


def test_columns_can_be_set(tmp_path: Path) -> None:
    row = {"question": "Which colour?", "good": "red", "bad": "blue", "chosen": "none"}
    task = task_of(tmp_path, row, columns={"chosen": "good", "rejected": "bad"})
    assert texts(pair_of(task).chosen, pair_of(task).rejected) == ["red", "blue"]
    assert task.data_table()["rejected"] == "bad (text)"


def test_without_worse_answers_there_are_no_pairs(tmp_path: Path) -> None:
    with pytest.raises(NoPreferencesError, match=r"set task.columns.chosen and task.columns.rejected"):
        pair_of(task_of(tmp_path, {"question": "Which colour?", "answer": "red"}))


def test_a_task_of_ones_own() -> None:
    class Own:
        def preference(self, problem: Any) -> Any:
            return problem

    user, red = Message.of("user", "Which?"), Message.of("assistant", "red")
    own: Any = Own()
    pair: Any = Preference((user,), red, Message.of("assistant", "blue"))
    assert get_preference(own, pair) == pair
    for wrong, reason in (
        (Preference((), red, red), "preference\\(\\).prompt returned no message"),
        (Preference((user, red), red, red), "ends with a message of role assistant"),
        (Preference((user,), user, red), "preference\\(\\).chosen returned a message of role 'user'"),
    ):
        problem: Any = wrong
        with pytest.raises(TaskCodeError, match=reason):
            get_preference(own, problem)
    other: Any = object()
    with pytest.raises(NoPreferencesError, match=r"object defines no preference.* set dpo.from_run"):
        get_preference(other, pair)
