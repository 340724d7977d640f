"""What the ranks other than 0 do with the trainer's commands."""

from __future__ import annotations

from typing import Any

import pytest

from vlmrl.trainer.commands import Follower, GiveWeights, Learn, ScoreByReference, ScoreTokens, Skip


class Noting(Follower):
    """Notes what its learner is asked for, and when it makes room."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[str] = []

    def make_room(self) -> None:
        self.done.append("room")

    @property
    def learner(self) -> Any:
        return self

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: self.done.append(name)


SHARE: Any = None


@pytest.mark.parametrize(
    ("command", "wanted"),
    [
        (Learn(None, None, SHARE), ["room", "learn"]),
        (ScoreTokens(SHARE), ["room", "token_metrics"]),
        (ScoreByReference(SHARE), ["room", "reference_scores"]),
        (GiveWeights(), ["give_weights"]),
        (Skip(), ["skip"]),
    ],
)
def test_passes_of_the_learner_have_the_memory_of_the_sampler(command: Any, wanted: list[str]) -> None:
    worker = Noting()
    command.run(worker)
    assert worker.done == wanted
