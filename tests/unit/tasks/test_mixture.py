"""The mixture: its order is arithmetic, and each task keeps its own problems, answers and turns."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st

from vlmrl.config.dataset import DatasetConfig
from vlmrl.config.task import ColorCodewordConfig, MixtureConfig, most_turns, tasks_of
from vlmrl.errors import ConfigError
from vlmrl.orchestrator.stream import FixedProblems, ProblemStream
from vlmrl.tasks.base import BadRow, FromRow, NoProblem, NotInSplit, Reference, Reply
from vlmrl.tasks.border import get_num_rows
from vlmrl.tasks.check import check_task, print_findings
from vlmrl.tasks.color_codeword import ColorCodeword
from vlmrl.tasks.mixture import LONGEST_PERIOD, MixtureTask, Pattern, Rounds, whole_numbers
from vlmrl.tasks.preferences import NoPreferencesError, get_preference
from vlmrl.types import Message

WEIGHTS = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=5)


@hypothesis.given(WEIGHTS, st.integers(0, 2**41))
@hypothesis.settings(max_examples=30, deadline=None)
def test_training_gives_each_task_every_index_of_its_own_once(weights: list[float], start: int) -> None:
    pattern = Pattern(weights)
    places = [pattern.place(index) for index in range(start, start + 200)]
    for number in range(len(weights)):
        own = [index for task, index in places if task == number]
        assert own == list(range(own[0], own[0] + len(own))) if own else True


@hypothesis.given(WEIGHTS)
@hypothesis.settings(max_examples=20, deadline=None)
def test_shares_follow_the_weights(weights: list[float]) -> None:
    pattern, numbers = Pattern(weights), whole_numbers(weights)
    counts = Counter(pattern.place(index)[0] for index in range(sum(numbers)))
    for number, weight in enumerate(weights):
        share = counts[number] / sum(numbers)
        assert abs(share - weight / sum(weights)) <= len(weights) / LONGEST_PERIOD
        assert counts[number] == numbers[number] > 0


def test_every_task_is_spread_evenly() -> None:
    pattern = Pattern([3, 1])
    assert [pattern.place(index)[0] for index in range(8)] == [0, 0, 1, 0, 0, 0, 1, 0]


@pytest.mark.parametrize("rows", [[3, 5], [4], [2, 2, 7], [1, None, 3], [None]])
def test_rounds_play_every_row_once(rows: list[int | None]) -> None:
    rounds = Rounds(rows)
    total = sum(count for count in rows if count) + (10 if None in rows else 0)
    places = [rounds.place(index) for index in range(total)]
    assert len(set(places)) == total
    for number, count in enumerate(rows):
        own = [index for task, index in places if task == number]
        assert own == list(range(len(own)))
        assert count is None or len(own) == count
    assert [task for task, _ in places[: len(rows)]] == list(range(len(rows))), "one of each first"


# ── tasks ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def config(tmp_path: Path) -> MixtureConfig:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"question": f"What is {n} + 1?", "answer": n + 1}) + "\n" for n in range(50)))
    sums = DatasetConfig(path=str(rows), eval_fraction=0.2)
    return MixtureConfig(tasks={"sums": sums, "colors": ColorCodewordConfig()}, weights={"sums": 3})


@pytest.fixture
def task(config: MixtureConfig) -> MixtureTask:
    return MixtureTask(config, seed=0)


def found(task: MixtureTask, count: int) -> list[str]:
    problems = []
    for index in range(count):
        try:
            problems.append(task.problem("train", index).task)
        except NoProblem:
            continue
    return problems


def test_problems_are_those_of_the_tasks(task: MixtureTask, config: MixtureConfig) -> None:
    names = Counter(found(task, 400))
    assert names["colors"] == 100
    assert 200 < names["sums"] < 280, "rows that are held out are passed over"
    colors = next(index for index in range(8) if task.place("train", index)[0] == "colors")
    problem = task.problem("train", colors)
    own = ColorCodeword(ColorCodewordConfig(), seed=0).problem("train", 0)
    assert (problem.id, problem.max_turns) == (f"colors/{own.id}", 2)
    assert not isinstance(problem, Reference)
    assert most_turns(config) == 2
    assert list(tasks_of(config)) == ["task.tasks.sums", "task.tasks.colors"]


def test_a_row_keeps_its_answer_and_its_place(task: MixtureTask) -> None:
    index = next(index for index in range(400) if found_at(task, index) == "sums")
    problem = task.problem("train", index)
    assert isinstance(problem, Reference)
    assert isinstance(problem, FromRow)
    assert str(problem.answer) == str(problem.row + 1)
    assert problem.columns["answer"] == problem.row + 1
    assert problem.max_turns == 1
    env = task.env(problem)
    assert str(problem.row) in str(env.reset()[-1].content)
    assert env.step("7") == Reply(done=True)
    demonstration = task.demonstration(problem, random_answers=False, seed=0)
    assert demonstration[-1].role == "assistant"


def found_at(task: MixtureTask, index: int) -> str:
    try:
        return task.problem("train", index).task
    except NoProblem:
        return ""


def held_out(task: MixtureTask, count: int) -> list[str]:
    drawn = asyncio.run(FixedProblems(ProblemStream(task, "eval", once=True)).first(count))
    return [each.problem_id for each in drawn]


def test_an_evaluation_takes_the_tasks_in_turn(task: MixtureTask) -> None:
    """One row in five is held out, and none of the other task is missing: half of each all the same."""
    drawn = held_out(task, 8)
    assert [name.partition("/")[0] for name in drawn] == ["sums", "colors"] * 4
    assert held_out(task, 8) == drawn
    names = Counter(name.partition("/")[0] for name in held_out(task, 60))
    rows = [row for row in range(50) if is_held_out(task, row)]
    assert names == {"sums": len(rows), "colors": 60 - len(rows)}


def is_held_out(task: MixtureTask, row: int) -> bool:
    try:
        task.tasks["sums"].problem("eval", row)
    except NotInSplit:
        return False
    return True


def test_pairs_are_those_of_the_tasks(tmp_path: Path, task: MixtureTask) -> None:
    rows = tmp_path / "pairs.jsonl"
    rows.write_text(
        "".join(json.dumps({"question": f"{n}?", "chosen": "yes", "rejected": "no"}) + "\n" for n in range(9))
    )
    asked = DatasetConfig(path=str(rows), eval_fraction=0.0)
    mixture = MixtureTask(MixtureConfig(tasks={"asked": asked, "again": asked}), seed=0)
    for index in range(4):
        pair = get_preference(mixture, mixture.problem("train", index))
        assert (pair.chosen, pair.rejected) == (Message.of("assistant", "yes"), Message.of("assistant", "no"))
    with pytest.raises(NoPreferencesError, match=r"set task.columns.chosen"):
        get_preference(task, next(task.problem("train", n) for n in range(9) if found_at(task, n).startswith("sums")))


def test_num_rows(task: MixtureTask, config: MixtureConfig) -> None:
    assert get_num_rows(task, "train") is None, "color_codeword is endless"
    only = MixtureTask(MixtureConfig(tasks={"a": config.tasks["sums"], "b": config.tasks["sums"]}), seed=0)
    assert (only.num_rows("train"), only.num_rows("eval")) == (100, 100)


def test_the_contract_holds(task: MixtureTask, config: MixtureConfig, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the mixture but for random answers, whose form differs between its tasks; mode=check checks each by itself."""
    violations = check_task(task, problems=4, max_turns=2)
    assert [text.partition(":")[0] for text in violations] == ["random_demonstrations"]
    assert print_findings({"task": config}) == 0
    shown = capsys.readouterr().out
    assert shown.index("task.tasks.sums") < shown.index("task.tasks.colors")


def test_faults_name_the_keys_of_the_task(tmp_path: Path) -> None:
    missing = MixtureConfig(tasks={"a": DatasetConfig(path=str(tmp_path / "none.jsonl"))})
    with pytest.raises(ConfigError, match=r"task\.tasks\.a\.path="):
        MixtureTask(missing, seed=0)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "?", "image": "none.png", "answer": "1"}\n')
    broken = MixtureConfig(tasks={"a": DatasetConfig(path=str(rows), eval_fraction=0)})
    with pytest.raises(BadRow, match=r"none\.png"):
        MixtureTask(broken, seed=0).problem("train", 0)
