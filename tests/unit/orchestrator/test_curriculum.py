"""The curriculum: which problems are wanted, which rewards a choice rests on, and what a checkpoint keeps."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlmrl.config.task import CurriculumConfig
from vlmrl.orchestrator.curriculum import Curriculum
from vlmrl.record import difficulty as difficulty_module
from vlmrl.record.difficulty import Attempts, Difficulty
from vlmrl.types import DropReason, Group, Rollout, StopReason

ROWS = 10


def group(problem: str, *rewards: float | None, index: int = 0) -> Group:
    """Rollouts with these rewards; None is a fault."""
    rollouts = [Rollout.unplayed(f"train/000001/00/{i}", "train", index, i) for i in range(len(rewards))]
    for rollout, reward in zip(rollouts, rewards, strict=True):
        turn: object = object()
        rollout.turns = [turn]  # type: ignore[list-item]
        rollout.reward = reward or 0.0
        rollout.stop_reason = StopReason.TASK_ERROR if reward is None else StopReason.TERMINATED
    return Group(problem, rollouts)


def make(max_staleness: int = 0, num_rows: int | None = ROWS, **settings: float) -> Curriculum:
    return Curriculum(CurriculumConfig(**settings), num_rows, max_staleness)  # type: ignore[arg-type]


def after(curriculum: Curriculum, *groups: Group) -> Curriculum:
    curriculum.learn(1, groups)
    curriculum.begin(2 + curriculum.max_staleness)
    return curriculum


def test_a_problem_that_was_never_played_is_wanted() -> None:
    assert make(solved=1, hopeless=0, low=0.2, high=0.8).wants(1, 0, "new")


def test_solved_problems_are_passed_over() -> None:
    curriculum = after(make(solved=1), group("all", 1, 1), group("half", 1, 0), group("none", 0, 0))
    assert [curriculum.wants(2, 20, name) for name in ("all", "half", "none")] == [False, True, True]
    assert curriculum.metrics(2) == {
        "curriculum/passed_over": 1.0,
        "curriculum/known": 3.0,
        "curriculum/solved": 1.0,
        "curriculum/hopeless": 0.0,
    }


def test_a_problem_that_failed_at_first_can_be_solved_later() -> None:
    curriculum = make(solved=1)
    for step in (1, 2, 3):
        curriculum.learn(step, [group("p", *([0.0, 0.0] if step == 1 else [1.0, 1.0]))])
        curriculum.begin(step + 1)
        assert curriculum.wants(step + 1, 9 * step, "p") is (step < 3), "the last two groups count"


@pytest.mark.parametrize("rest", [1, 2])
def test_hopeless_problems_rest_for_whole_passes(rest: int) -> None:
    """Played in pass 0, at index 4; passes begin at multiples of 10."""
    curriculum = after(make(hopeless=0, rest=rest), group("none", 0, 0, index=4))
    wanted = [curriculum.wants(2, 10 * epoch + place, "none") for epoch in range(5) for place in (0, 9)]
    assert wanted == [False] * 2 * (1 + rest) + [True] * 2 * (4 - rest)


def test_the_band_is_aimed_at() -> None:
    curriculum = after(
        make(low=0.3, high=0.6, outside=4), group("low", 0, 0, 0, 1), group("inside", 0, 1), group("high", 1, 1)
    )
    wanted = {name: sum(curriculum.wants(2, index, name) for index in range(400)) for name in ("low", "inside", "high")}
    assert wanted["inside"] == 400
    assert 70 < wanted["low"] < 130
    assert wanted["high"] == wanted["low"], "chance depends on the index alone"


def test_faults_and_missing_rewards_are_no_attempts() -> None:
    abstained = group("p", 1, 0, 0)
    abstained.rollouts[1].dropped = DropReason.NO_REWARD
    curriculum = after(make(solved=1), group("faulty", None, None), group("mixed", 1, None), abstained)
    assert curriculum.difficulty.by_id == {
        "mixed": Attempts(1, 1, last=0),
        "p": Attempts(1, 2, last=0),
    }


@pytest.mark.parametrize("pass_at", [1.0, 0.5])
def test_a_reward_from_pass_at_on_solves(pass_at: float) -> None:
    curriculum = after(make(solved=1, pass_at=pass_at), group("p", 0.9 + 0.1, 0.1 * 3 + 0.7, 0.6))
    assert curriculum.difficulty.by_id["p"].solved == (2 if pass_at == 1.0 else 3)


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
def test_a_choice_rests_on_steps_that_are_known_whatever_the_timing(max_staleness: int) -> None:
    """Step s begins to draw once step s − 1 − max_staleness is learned; whether later ones are is up to the timing."""

    def wants_of(learned_early: int) -> list[bool]:
        curriculum = make(max_staleness, solved=1)
        learned = 0
        wanted = []
        for step in range(1, 8):
            for known in range(learned + 1, max(learned, step - 1 - max_staleness + learned_early) + 1):
                curriculum.learn(known, [group(f"p{known}", 1, 1)])
                learned = known
            curriculum.begin(step)
            wanted += [curriculum.wants(step, step, f"p{i}") for i in range(1, 8)]
        return wanted

    assert wants_of(0) == wants_of(max_staleness)
    assert not all(wants_of(0)), "else the test shows nothing"


def test_a_checkpoint_has_every_step_that_was_learned(tmp_path: Path) -> None:
    curriculum = make(max_staleness=2, solved=1)
    curriculum.learn(1, [group("a", 1, 1, index=3)])
    curriculum.learn(2, [group("b", 0, 0, index=4), group("a", 1, 1, index=5)])
    curriculum.begin(4)
    assert list(curriculum.difficulty.by_id) == ["a"], "step 2 waits"
    state = curriculum.state()
    assert state.by_id == {"b": Attempts(0, 2, last=4), "a": Attempts(2, 2, 2, 2, last=5)}
    assert list(curriculum.difficulty.by_id) == ["a"], "saving changes nothing"
    state.write(tmp_path / "difficulty.parquet")
    read = Difficulty.read(tmp_path / "difficulty.parquet")
    assert list(read.by_id.items()) == list(state.by_id.items())
    resumed = make(solved=1)
    resumed.restore(read)
    assert (resumed.wants(3, 9, "a"), resumed.wants(3, 9, "b")) == (False, True)
    assert resumed.metrics(0)["curriculum/solved"] == 1.0


def test_the_problems_that_were_not_played_for_longest_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(difficulty_module, "MAX_PROBLEMS", 2)
    curriculum = make(solved=1)
    for step, name in enumerate(("a", "b", "a", "c"), start=1):
        curriculum.learn(step, [group(name, 1, 1)])
        curriculum.begin(step + 1)
    assert list(curriculum.difficulty.by_id) == ["a", "c"]
    assert curriculum.metrics(5)["curriculum/solved"] == 2.0


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no parquet at all"])
def test_a_damaged_file_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "difficulty.parquet"
    path.write_bytes(content)
    with pytest.raises(OSError, match=r"difficulty\.parquet"):
        Difficulty.read(path)
