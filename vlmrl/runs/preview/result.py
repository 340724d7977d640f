"""All that a preview has seen: what the screen, the page and the JSON show."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vlmrl.config.run import RunConfig
from vlmrl.runs.preview.answers import Answered
from vlmrl.runs.preview.findings import Finding
from vlmrl.runs.preview.grading import Graded
from vlmrl.runs.preview.sample import Sample, SeenProblem
from vlmrl.tasks.base import Split


@dataclass(frozen=True)
class Preview:
    """All that was seen."""

    config: RunConfig
    data: dict[str, str]
    """What the task read and recognized."""
    samples: dict[Split, Sample]
    graded: dict[str, Graded]
    """Problem id → what the rewards say of its reference."""
    answers: list[Answered]
    no_answers: str
    """Why the model gave no answers; empty where it did."""
    findings: list[Finding]
    tokenizer: Any

    @property
    def shown(self) -> list[SeenProblem]:
        """The problems of the page."""
        return [each for each in self.samples["train"].problems if each.prompt is not None]
