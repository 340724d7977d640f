"""When a run ends: after `trainer.max_steps` steps, or after `trainer.max_epochs` passes over the training problems."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class HasPasses(Protocol):
    """What a run learns from."""

    def passes(self, step: int) -> float | None:
        """Passes over it that the weights after `step` have learned from; None where it is endless."""
        ...


@dataclass(frozen=True)
class Length:
    """The length of a run, in steps or in passes."""

    problems: HasPasses
    max_steps: int
    """The most steps; with `max_epochs`, as many as the passes have if no row is passed over."""
    max_epochs: float | None = None
    """Passes over the training problems; None: the run makes `max_steps` steps."""

    def is_last(self, step: int) -> bool:
        """Whether the run ends after `step`, which the weights contain."""
        return step >= self.max_steps or (self.max_epochs is not None and self._passes(step) >= self.max_epochs)

    def last_step(self, step: int) -> int:
        """The last step of the run, as far as it is known after `step`."""
        return step if self.is_last(step) else self.max_steps

    def decay_steps(self, step: int) -> float | None:
        """How many steps the run has if the next ones need as many rows each as those until `step`, for the learning
        rate; None: as many as the config says."""
        if self.max_epochs is None or not self._passes(step):
            return None
        return step * self.max_epochs / self._passes(step)

    def _passes(self, step: int) -> float:
        return self.problems.passes(step) or 0.0
