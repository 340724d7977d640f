"""The table of `mode=doctor` and `mode=replay`: one verdict per line, on the screen, as JSON, and as an error.

    name                  state        finding                                  bound
    logprobs, version 0   ok           960 tokens: mismatch_kl 1.2e-13, …       (bound: mismatch_kl <= 1.0e-08)
    positions, engine     not visible  the engine computes in another process …
    logprobs, trainer     DIFFERS      1 of 320 logprobs differ, …

A doctor's check ends as `ok` or `FAILED`; a replay's comparison as `same`, `rounding` or `DIFFERS`; both may be
`not visible`, which is no failure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from vlmrl.errors import ParityError


class State(StrEnum):
    """How a check or a comparison ended."""

    OK = "ok"
    SAME = "same"
    """Equal to the last bit."""
    ROUNDING = "rounding"
    """Logprobs differ, but no difference is larger than the dtypes explain."""
    FAILED = "FAILED"
    DIFFERS = "DIFFERS"
    NOT_VISIBLE = "not visible"
    """There was nothing to look at; the finding says why."""

    @property
    def is_failure(self) -> bool:
        """Whether the command ends with an error because of it."""
        return self in (State.FAILED, State.DIFFERS)


@dataclass(frozen=True)
class Verdict:
    """One line of the table."""

    name: str
    state: State
    finding: str
    """What was measured, or why nothing could be."""
    bound: str = ""
    """The limit that a measured number had to keep, e.g. `mismatch_kl <= 1.0e-08`; empty where there is none."""
    first: Mapping[str, object] | None = None
    """Where the first difference is, e.g. `{"rollout_id": …, "turn": 0, "prompt_token": 17}`; None without one."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The measured numbers, for programs that read the JSON."""

    @property
    def line(self) -> str:
        """State, finding and bound, as the screen shows them next to the name."""
        return f"{self.state:<11}  {self.finding}" + (f" (bound: {self.bound})" if self.bound else "")

    def as_json(self, column: Literal["bound", "first"]) -> dict[str, object]:
        """The verdict as doctor.json (which has the column `bound`) or replay.json (`first`) records it."""
        return {
            "name": self.name,
            "verdict": self.state,
            "says": self.finding,
            column: self.bound if column == "bound" else self.first,
            "figures": self.metrics,
        }


def not_visible(name: str, why: str) -> Verdict:
    """There is nothing to look at."""
    return Verdict(name, State.NOT_VISIBLE, why)


def failed(name: str, finding: str) -> Verdict:
    """The check failed, and no number measures by how much."""
    return Verdict(name, State.FAILED, finding)


def judged(name: str, holds: bool, finding: str, bound: str = "", **metrics: float) -> Verdict:
    """`ok` where the check `holds`, else `FAILED`."""
    return Verdict(name, State.OK if holds else State.FAILED, finding, bound, metrics=metrics)


def as_table(verdicts: Sequence[Verdict]) -> dict[str, str]:
    """Name → line, in order."""
    return {verdict.name: verdict.line for verdict in verdicts}


def conclude(verdicts: Sequence[Verdict], consequence: str) -> None:
    """Raise `ParityError` with the lines that failed and what follows from it (`so …`); return where none failed."""
    failures = [verdict for verdict in verdicts if verdict.state.is_failure]
    if failures:
        listed = "\n".join(
            f"  {verdict.name}: {verdict.finding}" + (f" ({verdict.bound})" if verdict.bound else "")
            for verdict in failures
        )
        raise ParityError(f"{len(failures)} of {len(verdicts)} lines failed, {consequence}:\n{listed}")
