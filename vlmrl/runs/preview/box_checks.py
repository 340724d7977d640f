"""Boxes of references: whether they lie on their images, in the space and the format that the reward says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vlmrl.config.reward import BoxSpace, IouTerm
from vlmrl.config.run import RunConfig
from vlmrl.errors import safe_repr
from vlmrl.rewards.boxes import corners, is_box, plausible_spaces, shapes_in_value
from vlmrl.runs.preview.findings import FEW, Code, Finding, named
from vlmrl.runs.preview.grading import terms_of
from vlmrl.runs.preview.seen import SeenProblem


def box_findings(config: RunConfig, task: str, problems: Sequence[SeenProblem]) -> Iterator[Finding]:
    """What is wrong with the boxes of one task (a name in a mixture, or empty)."""
    for name, term in terms_of(config, task).items():
        if isinstance(term, IouTerm):
            yield from _of_term(problems, task, f"reward.terms.{name}", term)


def _of_term(problems: Sequence[SeenProblem], task: str, said: str, term: IouTerm) -> Iterator[Finding]:
    spaces, wrong, broken, count = set(BoxSpace), list[SeenProblem](), list[SeenProblem](), 0
    for problem in problems:
        if problem.task != task or len(problem.images) != 1:
            continue
        shapes = shapes_in_value(problem.reference, points=True)
        if not shapes:
            continue
        count += 1
        boxes = [corners(shape, term.reference_format) for shape in shapes]
        if any(len(box) == 4 and not is_box(box) for box in boxes):
            broken.append(problem)
        possible = plausible_spaces(boxes, problem.images[0])
        spaces &= possible
        if term.reference_space not in possible:
            wrong.append(problem)
    if len(wrong) > FEW * count:
        fitting = [space.name for space in BoxSpace if space in spaces]
        remedy = f"set {said}.reference_space={fitting[0]}" if fitting else "look at the boxes of these rows"
        first = wrong[0]
        yield Finding(
            Code.BOX_SPACE,
            f"the boxes of {len(wrong)} of {count} problems do not lie on their images in "
            f"{said}.reference_space={term.reference_space.name} ({safe_repr(first.reference):.80} on an image of "
            f"{first.images[0].width} x {first.images[0].height} pixels), so right answers are paid as wrong ones: "
            f"{remedy}",
            named(wrong),
            task,
        )
    elif len(broken) > FEW * count:
        yield Finding(
            Code.BOX_SPACE,
            f"the boxes of {len(broken)} of {count} problems have no positive width and height in "
            f"{said}.reference_format={term.reference_format.name} ({safe_repr(broken[0].reference):.80}), so no "
            f"answer matches them: set {said}.reference_format to xywh or cxcywh",
            named(broken),
            task,
        )
