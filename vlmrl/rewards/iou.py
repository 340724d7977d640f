"""`reward=iou`: how well the boxes or points of an answer match those of the reference.

    answer, reference ─▶ numbers ─▶ corners in one space ─▶ a degree per pair ─▶ matching ─▶ 2 Σ / (answer + reference)

The degree of a pair is its intersection over union (IoU); 1 for a point in a box; for two points, a number that falls
with their distance. Answer and reference are matched one to one such that the sum of degrees is largest (the Hungarian
method, as in COCO's panoptic quality and DETR), because greedy matching can lose. The value is 1 only for a perfect
set: a missing box and a superfluous one both cost. For one box and one reference it is the IoU itself.

- A box that is malformed (a coordinate that is not finite, right of left, no area) matches nothing and still counts.
- Boxes that reach outside the image are not clipped.
- Answer and reference in different spaces are compared in pixels of the original image. Coordinates refer to the first
  image of the prompt.
- An empty list as reference says that there is no object; an answer without boxes is then worth 1.
- The term abstains where the reference is missing, or is not well-formed boxes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vlmrl.config.reward import BoxShape, IouTerm
from vlmrl.rewards.base import Attempt
from vlmrl.rewards.boxes import Numbers, corners, is_box, on_original, shapes_in_text, shapes_in_value


def score_iou(term: IouTerm, attempt: Attempt) -> float | None:
    """The value described above, from 0 to 1; None where the term abstains. Raises ValueError where the spaces differ
    and the prompt has no image."""
    wants_points = term.shape is BoxShape.point
    references = shapes_in_value(attempt.reference, points=wants_points)
    if references is None:
        return None
    wanted = [corners(shape, term.reference_format) for shape in references]
    if not all(is_box(each) if len(each) == 4 else np.isfinite(each).all() for each in wanted):
        return None
    if attempt.answer is None:
        return 0.0
    found = [corners(shape, term.answer_format) for shape in shapes_in_text(attempt.answer, points=wants_points)]
    if not found or not wanted:
        return float(not found and not wanted)
    if term.answer_space is not term.reference_space:
        found, wanted = _in_one_space(term, attempt, found, wanted)
    degrees = _degrees(term, found, wanted)
    if term.threshold is not None:
        degrees = (degrees >= term.threshold).astype(np.float64)
    return 2 * _best_sum(degrees) / (len(found) + len(wanted))


def _in_one_space(
    term: IouTerm, attempt: Attempt, found: list[Numbers], wanted: list[Numbers]
) -> tuple[list[Numbers], list[Numbers]]:
    if not attempt.images:
        raise ValueError(
            f"answer_space={term.answer_space.value} and reference_space={term.reference_space.value} differ, and the "
            "prompt has no image, so their coordinates cannot be compared: set both to the same space"
        )
    image = attempt.images[0]
    return (
        [on_original(each, term.answer_space, image) for each in found],
        [on_original(each, term.reference_space, image) for each in wanted],
    )


def _degrees(term: IouTerm, found: list[Numbers], wanted: list[Numbers]) -> NDArray[np.float64]:
    """float64 [found, wanted], from 0 to 1."""
    if term.shape is BoxShape.box:
        return np.array([[iou(a, b) for b in wanted] for a in found])
    return np.array([[_near(_point(a), b, term.radius) for b in wanted] for a in found])


def iou(first: Numbers, second: Numbers) -> float:
    """Intersection over union of two boxes (left, top, right, bottom); 0 where one is malformed.

    >>> iou((0, 0, 10, 10), (5, 0, 15, 10))
    0.3333333333333333
    """
    if not is_box(first) or not is_box(second):
        return 0.0
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    if width <= 0 or height <= 0:
        return 0.0
    both = width * height
    return both / (
        (first[2] - first[0]) * (first[3] - first[1]) + (second[2] - second[0]) * (second[3] - second[1]) - both
    )


def _point(numbers: Numbers) -> Numbers:
    """A point, or the center of a box."""
    if len(numbers) == 2:
        return numbers
    return (numbers[0] + numbers[2]) / 2, (numbers[1] + numbers[3]) / 2


def _near(point: Numbers, target: Numbers, radius: float) -> float:
    """Whether a point lies in a box (its edge counts), or how near it is to a point."""
    if not np.isfinite(point).all():
        return 0.0
    if len(target) == 4:
        return float(target[0] <= point[0] <= target[2] and target[1] <= point[1] <= target[3])
    return max(0.0, 1 - float(np.hypot(point[0] - target[0], point[1] - target[1])) / radius)


def _best_sum(degrees: NDArray[np.float64]) -> float:
    """The largest sum of entries of which no two share a row or a column: the Hungarian method with potentials, O(r² c)
    for r ≤ c.

    >>> _best_sum(np.array([[0.54, 0.33], [0.82, 0.82]]))  # greedy matching takes 0.82 + 0.33
    1.3599999999999999
    """
    costs = -(degrees if degrees.shape[0] <= degrees.shape[1] else degrees.T)
    num_rows, num_columns = costs.shape
    row_potential, column_potential = np.zeros(num_rows + 1), np.zeros(num_columns + 1)
    row_of = np.zeros(num_columns + 1, dtype=np.int64)  # row 0 and column 0 stand for "none"
    for row in range(1, num_rows + 1):
        row_of[0], column = row, 0
        slack = np.full(num_columns + 1, np.inf)
        came_from = np.zeros(num_columns + 1, dtype=np.int64)
        is_done = np.zeros(num_columns + 1, dtype=bool)
        while row_of[column]:
            is_done[column] = True
            at = row_of[column]
            reduced = costs[at - 1] - row_potential[at] - column_potential[1:]
            is_better = ~is_done[1:] & (reduced < slack[1:])
            slack[1:][is_better] = reduced[is_better]
            came_from[1:][is_better] = column
            following = 1 + int(np.argmin(np.where(is_done[1:], np.inf, slack[1:])))
            step = slack[following]
            row_potential[row_of[is_done]] += step
            column_potential[is_done] -= step
            slack[~is_done] -= step
            column = following
        while column:
            row_of[column] = row_of[came_from[column]]
            column = int(came_from[column])
    matched = np.flatnonzero(row_of[1:])
    return float(-costs[row_of[1:][matched] - 1, matched].sum())
