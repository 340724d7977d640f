"""All that a preview has seen: what the screen, the page and the JSON show."""

from __future__ import annotations

from dataclasses import dataclass

from vlmrl.config.run import RunConfig
from vlmrl.runs.build import RenderingParts
from vlmrl.runs.preview.answers import Answered
from vlmrl.runs.preview.findings import Finding
from vlmrl.runs.preview.grading import Graded
from vlmrl.runs.preview.sample import Sample
from vlmrl.runs.preview.seen import SeenProblem
from vlmrl.tasks.base import Split


@dataclass(frozen=True)
class Preview:
    """All that was seen."""

    config: RunConfig
    data: dict[str, str]
    """What the task read and recognized."""
    samples: dict[Split, Sample]
    answers: list[Answered]
    no_answers: str
    """Why the model gave no answers; empty where it did."""
    findings: list[Finding]
    parts: RenderingParts

    def graded(self, problem: SeenProblem) -> Graded | None:
        """What the rewards say of a problem's reference; None where it has none."""
        return self.samples[problem.split].graded.get(problem.problem_id)

    @property
    def shown(self) -> list[SeenProblem]:
        """The problems of the page."""
        return [each for each in self.samples["train"].problems if each.prompt is not None]
