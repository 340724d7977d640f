"""The reward of boxes and points, on a table of counted pixels and hand-made cases that was written before it."""

from __future__ import annotations

import itertools
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]

from support.reward_cases import attempt, attempt_of, cases
from vlmrl.config.reward import BoxFormat, BoxShape, BoxSpace, IouTerm
from vlmrl.rewards.base import SeenImage
from vlmrl.rewards.boxes import plausible_spaces
from vlmrl.rewards.iou import _best_sum, score_iou

OPTIONS: dict[str, Any] = {
    "shape": BoxShape,
    "answer_space": BoxSpace,
    "reference_space": BoxSpace,
    "answer_format": BoxFormat,
    "reference_format": BoxFormat,
}


def test_table() -> None:
    wrong = []
    for case in cases("iou"):
        term = IouTerm(**{name: OPTIONS.get(name, float)(value) for name, value in case.get("options", {}).items()})
        value = score_iou(term, attempt_of(case))
        if value != (None if case["expected"] is None else pytest.approx(case["expected"], abs=1e-8)):
            wrong.append((case, value))
    assert not wrong, f"{len(wrong)} cases:\n" + "\n".join(map(str, wrong))


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**32))
def test_matching_equals_all_permutations(rows: int, columns: int, seed: int) -> None:
    degrees = np.random.default_rng(seed).random((rows, columns)).round(1)
    wide = degrees if rows <= columns else degrees.T
    picks = itertools.permutations(range(wide.shape[1]), wide.shape[0])
    best = max(sum(wide[row, column] for row, column in enumerate(pick)) for pick in picks)
    assert _best_sum(degrees) == pytest.approx(best)


def test_matching_equals_scipy_on_large_sets() -> None:
    degrees: NDArray[np.float64] = np.random.default_rng(0).random((40, 300))
    picked = linear_sum_assignment(degrees, maximize=True)
    assert _best_sum(degrees) == pytest.approx(degrees[picked].sum())


def test_no_answer_is_wrong() -> None:
    assert score_iou(IouTerm(), attempt([1, 2, 3, 4], None)) == 0.0


def test_references_as_arrays() -> None:
    for reference in (np.array([1.0, 2, 3, 4]), np.array([[1, 2, 3, 4]]), [np.array([1, 2, 3, 4])]):
        assert score_iou(IouTerm(), attempt(reference, "[1, 2, 3, 4]")) == 1.0


def test_different_spaces_need_an_image() -> None:
    with pytest.raises(ValueError, match="answer_space=thousand and reference_space=absolute differ"):
        score_iou(IouTerm(answer_space=BoxSpace.thousand), attempt([1, 2, 3, 4], "[1, 2, 3, 4]"))


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Top-left: (10, 20), bottom-right: (30, 40)", 1.0),
        ("(10, 20)-(30, 40)", 1.0),
        ("[10, 20] to [30, 40]", 1.0),
        ("[−10, 20, 30, 40]", 0.5),
        ("[10，20，30，40]", 1.0),
        ("[10; 20; 30; 40]", 1.0),
    ],
)
def test_more_spellings(answer: str, expected: float) -> None:
    assert score_iou(IouTerm(), attempt([10, 20, 30, 40], answer)) == expected


def test_a_box_in_qwens_tags_counts_as_its_center() -> None:
    term = IouTerm(shape=BoxShape.point)
    assert score_iou(term, attempt([15, 25, 25, 35], "<|box_start|>(10,20),(30,40)<|box_end|>")) == 1.0


def test_a_point_is_no_box() -> None:
    for answer in ('{"x": 20, "y": 30}', "[20, 30]", '[{"x": 1, "y": 2}, {"x1": 1'):
        assert score_iou(IouTerm(), attempt([10, 20, 30, 40], answer)) == 0.0
    assert score_iou(IouTerm(), attempt({"x": 20, "y": 30}, "[10, 20, 30, 40]")) is None


def test_a_reference_below_the_key_objects() -> None:
    assert score_iou(IouTerm(), attempt({"objects": [{"bbox": [1, 2, 3, 4]}]}, "[1, 2, 3, 4]")) == 1.0


LONG = [
    "[" * 100_000, "[1, 2, 3, 4] " * 10_000, "(1,2)," * 20_000, "{" * 100_000, "1 " * 50_000, '{"x1": ' * 10_000,
    "[1," * 30_000, "1," * 50_000, "[" + "1 " * 50_000, " " * 100_000, "-" * 100_000, "a=" * 50_000, "1e" * 50_000,
]  # fmt: skip


@pytest.mark.parametrize("text", LONG)
def test_long_answers_are_read_in_a_moment(text: str) -> None:
    began = time.process_time()
    for shape in BoxShape:
        score_iou(IouTerm(shape=shape), attempt([[1, 2, 3, 4], [5, 6, 7, 8]], text))
    assert time.process_time() - began < 3


IMAGE = SeenImage(1000, 500, 500, 250)


@pytest.mark.parametrize(
    ("boxes", "spaces"),
    [
        ([(0.1, 0.2, 0.3, 0.4)], {"relative"}),
        ([(10, 10, 50, 50)], {"absolute", "processed", "thousand"}),
        ([(10, 10, 50, 50), (600, 10, 900, 400)], {"absolute", "thousand"}),
        ([(600, 10, 900, 900)], {"thousand"}),
        ([(600, 10, 1500, 400)], set()),
        ([(0, 0, 1000, 500)], {"absolute", "thousand"}),
        ([(0, 0, 500, 250)], {"absolute", "processed", "thousand"}),
        ([(0, 0, 1, 1)], {"relative"}),
        ([(-50, 0, 100, 100)], set()),
        ([(400, 200)], {"absolute", "processed", "thousand"}),
        ([], {"absolute", "processed", "relative", "thousand"}),
    ],
)
def test_plausible_spaces(boxes: list[tuple[float, ...]], spaces: set[str]) -> None:
    assert {space.value for space in plausible_spaces(boxes, IMAGE)} == spaces
