"""The rollouts that a page shows: whole groups, evenly spaced, the same held-out problems, every drop reason."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmrl.monitor.report.choice import (
    DROPPED_GROUPS,
    Choice,
    Shape,
    choose,
    evaluation_rollouts,
    evaluation_sizes,
    evenly,
)
from vlmrl.record.metrics import Record
from vlmrl.record.run_dir import RunDir

RUN = RunDir("/nowhere")
SHAPE = Shape(groups_per_step=9, group_size=32, problems=128)


def chosen(
    steps: int, evaluations: int, wanted: int = 2000, metrics: list[Record] | None = None, shape: Shape = SHAPE
) -> Choice:
    at = [10 * i for i in range(evaluations)]
    return choose(RUN, shape, wanted, list(range(1, steps + 1)), at, metrics or [])


def counts(choice: Choice, shape: Shape = SHAPE) -> tuple[int, int]:
    """The number of training and of evaluation rollouts in a choice."""
    trained = sum(len(groups) for path, groups in choice.groups.items() if path.name.startswith("step"))
    evaluated = sum(len(groups) for path, groups in choice.groups.items() if path.name.startswith("eval"))
    return trained * shape.group_size, evaluated * 2


def step_of(path: Path) -> int:
    return int(path.stem.split("_")[1])


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_evenly_keeps_both_ends_and_repeats_nothing(count: int, wanted: int) -> None:
    places = evenly(count, wanted)
    assert len(places) == min(count, wanted) == len(set(places))
    assert places == sorted(places)
    assert places[-1] == count - 1
    gaps = {b - a for a, b in itertools.pairwise(places)}
    assert len(gaps) <= 2 or max(gaps) - min(gaps) <= 1


def test_a_run_that_fits_is_shown_whole() -> None:
    choice = chosen(5, 1)
    assert counts(choice) == (5 * 9 * 32, 256)
    assert {len(groups) for path, groups in choice.groups.items() if path.name.startswith("step")} == {9}


def test_a_long_run_is_sampled_evenly_over_steps_and_groups() -> None:
    choice = chosen(1000, 101)
    trained, evaluated = counts(choice)
    assert evaluated == 2 * 101 * 2
    assert 2000 - evaluated <= trained <= 2000 - evaluated + 32
    steps = sorted(step_of(path) for path in choice.groups if path.name.startswith("step"))
    assert (steps[0], steps[-1]) == (1, 1000)
    assert max(b - a for a, b in itertools.pairwise(steps)) <= 1.2 * 1000 / (len(steps) - 1)
    groups = {group for path, each in choice.groups.items() if path.name.startswith("step") for group in each}
    assert len(groups) > 4, "not always the first group of a step"


def test_held_out_problems_are_the_same_at_every_evaluation() -> None:
    choice = chosen(1000, 20)
    shown = [groups for path, groups in choice.groups.items() if path.name.startswith("eval")]
    assert len(shown) == 20
    assert all(each == shown[0] for each in shown)
    assert len(shown[0]) > 10


def test_more_evaluations_than_there_is_room_for() -> None:
    choice = chosen(50, 5000)
    trained, evaluated = counts(choice)
    assert trained + evaluated <= 2000 + SHAPE.group_size
    steps = sorted(step_of(path) for path in choice.groups if path.name.startswith("eval"))
    assert steps[-1] == 49990


@given(
    st.integers(0, 60),
    st.integers(0, 60),
    st.integers(1, 3000),
    st.builds(Shape, st.integers(1, 8), st.integers(1, 40), st.integers(0, 50)),
)
def test_at_most_one_group_more_than_wanted(steps: int, evaluations: int, wanted: int, shape: Shape) -> None:
    choice = chosen(steps, evaluations, wanted, shape=shape)
    trained, evaluated = counts(choice, shape)
    assert trained + evaluated <= wanted + shape.group_size + 2
    everything = steps * shape.step + 2 * evaluations * shape.problems
    if everything <= wanted:
        assert trained + evaluated == everything


def test_every_drop_reason_is_shown() -> None:
    metrics: list[Record] = [
        {
            "step": step,
            "rollouts/dropped": 1.0,
            "rollouts/dropped/stale": float(step > 900),
            "rollouts/dropped/fault": float(step == 77),
            "rollouts/dropped/zero_advantage": 200.0,
        }
        for step in range(1, 1001)
    ]
    choice = chosen(1000, 0, metrics=metrics)
    found = {(step_of(path), reason) for path, reasons in choice.dropped.items() for reason in reasons}
    assert {reason for _, reason in found} == {"stale", "fault"}, "zero_advantage has no extra groups"
    assert (77, "fault") in found
    stale = sorted(step for step, reason in found if reason == "stale")
    assert len(stale) == DROPPED_GROUPS
    assert (stale[0], stale[-1]) == (901, 1000)


SIZES = {
    "orchestrator.groups_per_step": 9,
    "orchestrator.group_size": 32,
    "orchestrator.eval.problems": 0,
    "orchestrator.eval.sets.ood.problems": 40,
    "orchestrator.eval.sets.ood.samples": 8,
    "orchestrator.eval.sets.ood.greedy": True,
    "orchestrator.eval.sets.v1.2.problems": 10,
    "orchestrator.eval.sets.v1.2.samples": 0,
    "orchestrator.eval.sets.v1.2.greedy": True,
}


def test_named_sets_count() -> None:
    """A run without a main evaluation has a page, with the problems of its sets and no more rollouts than fit."""
    shape = Shape.of(SIZES)
    assert (shape.problems, shape.answers) == (40, 8 + 1 + 1)
    choice = chosen(1000, 20, shape=shape)
    shown = [groups for path, groups in choice.groups.items() if path.name.startswith("eval")]
    assert len(shown) == 20
    assert all({0, 39} <= groups for groups in shown)
    assert sum(map(len, shown)) * shape.answers <= 0.3 * 2000


@pytest.mark.parametrize(("key", "value"), [("groups_per_step", 0), ("eval.sets.ood.samples", "many")])
def test_a_config_without_numbers_is_no_run(key: str, value: object) -> None:
    with pytest.raises((KeyError, TypeError)):
        Shape.of({**SIZES, f"orchestrator.{key}": value})


def test_rollouts_of_an_evaluation_are_those_of_the_sets_that_were_due() -> None:
    sizes = evaluation_sizes({**SIZES, "orchestrator.eval.problems": 6})
    assert sizes == {"": (6, 2), "ood": (40, 9), "v1.2": (10, 1)}
    assert evaluation_rollouts({"eval/reward": 0.0}, sizes) == 12
    assert evaluation_rollouts({"eval/reward": 0.5, "eval/ood/problems": 7.0}, sizes) == 12 + 63
    assert evaluation_rollouts({}, sizes) == 12 + 360 + 10


class Once(list[int]):
    """Steps that may be read, but not searched: a search per step is quadratic in the steps."""

    def __contains__(self, step: object) -> bool:
        pytest.fail("the steps were searched")

    def index(self, *_: object) -> int:
        pytest.fail("the steps were searched")


def test_the_work_grows_with_the_steps_that_have_drops_and_not_faster(tmp_path: Path) -> None:
    """Each line of the metrics is read once, and the files to read are as few for a long run as for a short one."""
    files = []
    for count in (1000, 4000):
        lines = [
            {"step": step, **{f"rollouts/dropped/{reason}": 1.0 for reason in "abcdefgh"}} for step in range(count)
        ]
        read = iter(lines)
        chosen = choose(RunDir(tmp_path), Shape(2, 4, 3), 100, Once(range(count)), [], read)
        assert next(read, None) is None
        files.append(len(chosen.paths))
        assert set(chosen.dropped) <= set(chosen.paths)
    assert files[0] == files[1] < 100
