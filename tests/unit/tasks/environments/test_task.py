"""task=gymnasium: problems and their splits, demonstrations, texts."""

from __future__ import annotations

from typing import Any

import pytest

from support.environments import GRID, LAKE, LAKES, task_of
from vlmrl.rendering.images import image_hash
from vlmrl.tasks.base import NotInSplit
from vlmrl.tasks.border import TaskCodeError
from vlmrl.tasks.check import check_task
from vlmrl.tasks.demonstrations import NoDemonstrationsError, get_demonstration
from vlmrl.tasks.environments import starts
from vlmrl.tasks.environments.starts import Starts
from vlmrl.tasks.environments.task import GymnasiumTask, Start
from vlmrl.types import Image, Message, Text

COUNTER: dict[str, Any] = {"env_id": "support.environments:Counter-v0"}


def first_hash(task: GymnasiumTask, problem: Start) -> str:
    """What the policy is shown first."""
    episode = task.env(problem)
    (source,) = [part.source for part in episode.reset()[-1].content if isinstance(part, Image)]
    episode.close()
    return image_hash(source)


def roles(messages: tuple[Message, ...]) -> list[str]:
    return [message.role for message in messages]


def answers(messages: tuple[Message, ...]) -> list[str]:
    texts = (message.content[0] for message in messages if message.role == "assistant")
    return [text.text for text in texts if isinstance(text, Text)]


@pytest.mark.parametrize(
    "settings", [LAKES, GRID, {**LAKES, "history": 2, "max_turns": 5}, {**GRID, "history": 1}, LAKE]
)
def test_it_keeps_the_contract(settings: dict[str, Any]) -> None:
    task = task_of(seed=3, **settings)
    assert check_task(task, problems=2, max_turns=settings.get("max_turns", 8)) == []


# ── start states ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("settings", [LAKES, GRID])
def test_held_out_start_states_are_never_trained_on(settings: dict[str, Any]) -> None:
    """By what the policy sees, for several seeds of the run."""
    held_out, trained_on = set(), set()
    for seed in (0, 1):
        task = task_of(seed=seed, **settings)
        held_out |= {first_hash(task, task.problem("eval", index)) for index in range(20)}
        trained_on |= {first_hash(task, task.problem("train", index)) for index in range(60)}
    assert not held_out & trained_on
    assert len(held_out) >= 2
    assert len(trained_on) >= 20


def test_every_run_is_evaluated_on_the_same_start_states() -> None:
    one, other = task_of(seed=1, **GRID), task_of(seed=2, **GRID)
    assert [one.problem("eval", i) for i in range(9)] == [other.problem("eval", i) for i in range(9)]
    assert [one.problem("train", i) for i in range(9)] != [other.problem("train", i) for i in range(9)]


def test_both_counts_are_told() -> None:
    found = task_of(**GRID).data_table()
    assert found["actions"] == "left, right, forward"
    assert found["start states"] == "32 in 128 seeds: 28 to train on, 4 held out (told apart by their first frames)"


def test_an_environment_with_too_few_start_states_holds_out_none_and_says_so() -> None:
    task = task_of(**LAKE)
    assert task.data_table()["start states"].startswith("1 in 128 seeds, fewer than task.holdout_one_in=8: none is")
    problems = [task.problem(split, index) for split in ("train", "eval") for index in range(50)]
    assert len({problem.seed for problem in problems}) == 100  # what is drawn after the start still differs


def test_of_few_start_states_one_is_held_out_all_the_same() -> None:
    odd = Starts(lambda seed: f"{seed % 9 * 8 + 1:x}", one_in=8, seed=0)  # no hash is divisible by 8
    assert {odd.seed_of("eval", index) % 9 for index in range(20)} == {0}
    assert {odd.seed_of("train", index) % 9 for index in range(200)} == set(range(1, 9))


def test_an_index_without_a_seed_of_its_split_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starts, "TRIES", 1)
    rare = Starts(lambda seed: "0" if seed == 5 else f"{seed * 8 + 1:x}", one_in=8, seed=0)
    with pytest.raises(NotInSplit, match="no seed of index 0 starts in a state of the split eval"):
        rare.seed_of("eval", 0)


# ── demonstrations ──────────────────────────────────────────────────────────────────────────────────────────


def test_the_expert_wins_its_demonstrations() -> None:
    for settings in (LAKES, GRID):
        task = task_of(**settings, max_turns=20, success_at=0.5)
        for index in range(10):
            problem = task.problem("train", index)
            shown, given = get_demonstration(task, problem, random_answers=False, seed=index)
            assert given == 1 or len(answers(shown)) == 1
            episode = task.env(problem)
            episode.reset()
            replies = [episode.step(answer) for answer in answers(shown)]
            assert [reply.done for reply in replies] == [False] * (len(replies) - 1) + [True]
            assert replies[-1].metrics["success"] == 1.0


def test_a_demonstration_fits_the_history() -> None:
    """It begins in any turn, ends with an answer, and shows no more frames than a prompt may."""
    task = task_of(**LAKES, history=2, max_turns=8)
    openings = set()
    for seed in range(30):
        for random_answers in (True, False):
            shown = task.demonstration(task.problem("train", 0), random_answers=random_answers, seed=seed)
            assert roles(shown) in (["user", "assistant"], ["user", "assistant", "user", "assistant"])
            openings.add(shown[0].content[-1].text.count(","))  # type: ignore[union-attr]
    assert len(openings) > 4


def test_without_an_expert_only_random_answers_are_known() -> None:
    task = task_of(**COUNTER)
    with pytest.raises(NoDemonstrationsError, match=r"task\.expert is not set, so nobody knows the right actions"):
        get_demonstration(task, Start(1), random_answers=False, seed=0)
    shown, _ = get_demonstration(task, Start(1), random_answers=True, seed=0)
    assert set(answers(shown)) <= {"0", "1", "2"}


def test_an_expert_that_names_no_action_costs_its_demonstration() -> None:
    task = task_of(**COUNTER, expert="support.environments:wrong")
    with pytest.raises(TaskCodeError, match="'jump' is none of the actions 0, 1, 2"):
        get_demonstration(task, Start(1), random_answers=False, seed=0)
    two = task_of(**COUNTER, expert="support.environments:always_two")
    assert answers(two.demonstration(Start(1), random_answers=False, seed=0)) == ["2"]


def test_texts_have_every_text_of_a_game() -> None:
    task = task_of(**{**LAKES, "history": 2}, system_prompt="Cross the lake.")
    texts = task.texts()
    assert {"Cross the lake.", "left", "down", "right", "up"} <= set(texts)
    assert any(text.startswith("So far: ") for text in texts)
