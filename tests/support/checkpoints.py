"""A trainer with two parameters, and the checkpoints it saves."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vlmrl.errors import NonFiniteLossError
from vlmrl.trainer.checkpoint import Checkpoints
from vlmrl.trainer.checkpoint_files import hashes
from vlmrl.trainer.loop_state import LoopState
from vlmrl.trainer.training_state import begin_to_save, not_finite, restore
from vlmrl.types import FloatArray, ReferenceScores, StepResult, TokenMetrics, TrainingSample

MODEL, OPTIMIZER = (f"shard-00001-model-0000{part}-of-00002.safetensors" for part in (1, 2))
FILES = (MODEL, OPTIMIZER, "state.json", "loop.json", "sha256.json")


@dataclass(eq=False)
class Learner:
    """A trainer with two parameters. Its gradients come from torch's random state."""

    inputs: int = 3
    frozen: bool = False
    sees_images: bool = True
    """Whether the bias, which stands in for a vision tower, gets a gradient."""
    betas: tuple[float, float] = (0.9, 0.95)
    version: int = 0
    model: torch.nn.Linear = field(init=False)

    def __post_init__(self) -> None:
        self.model = torch.nn.Linear(self.inputs, 2)
        self.model.weight.requires_grad_(not self.frozen)
        learning = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(learning, lr=0.1, betas=self.betas, fused=True)

    def train_step(
        self, samples: list[TrainingSample], demonstrations: Sequence[TrainingSample] = (), steps: float | None = None
    ) -> StepResult:
        for parameter in self.optimizer.param_groups[0]["params"]:
            parameter.grad = torch.randn_like(parameter) if self.sees_images or parameter.dim() > 1 else None
        self.optimizer.step()
        self.version += 1
        return StepResult(self.version)

    def logprobs(self, samples: Sequence[TrainingSample]) -> list[FloatArray]:
        raise AssertionError("a checkpoint scores nothing")

    def token_metrics(self, samples: Sequence[TrainingSample]) -> list[TokenMetrics]:
        raise AssertionError("a checkpoint scores nothing")

    def reference_scores(self, samples: Sequence[TrainingSample]) -> list[ReferenceScores]:
        raise AssertionError("a checkpoint scores nothing")

    def save(self, folder: str) -> Future[None]:
        broken = not_finite(self.parameters())
        if broken is not None:
            raise NonFiniteLossError(f"{broken} holds values that are not finite")
        counters = {"version": self.version}
        return begin_to_save(Path(folder), self.parameters(), self.optimizer, self.learning(), counters)

    def load(self, folder: str) -> None:
        found = restore(Path(folder), self.parameters(), self.optimizer, self.learning(), ["version"])
        self.version = found["version"]

    def learning(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.parameters().items() if p.requires_grad}

    def parameters(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters())

    def weights(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.model.parameters()]


def save(checkpoints: Checkpoints, step: int, learner: Learner, loop_state: LoopState) -> None:
    """Save a checkpoint and wait until it is on the disk."""
    checkpoints.save(step, learner, loop_state)
    checkpoints.finish()


def saved(folder: Path, *steps: int, keep: int = 9) -> Checkpoints:
    """Checkpoints of a learner after each of `steps`."""
    checkpoints, learner = Checkpoints(folder, keep), Learner()
    for step in range(1, max(steps) + 1):
        learner.train_step([])
        if step in steps:
            save(checkpoints, step, learner, LoopState(((0.25, step),)))
    return checkpoints


def refuse_warning(text: str) -> None:
    pytest.fail(text)


def hash_again(folder: Path) -> None:
    """Make sha256.json fit the files, as an editor of the checkpoint would."""
    (folder / "sha256.json").write_text(json.dumps(hashes(folder)))


def rewrite(folder: Path, name: str, change: Callable[[Any], Any]) -> None:
    """Change the content of a JSON file of a checkpoint."""
    (folder / name).write_text(json.dumps(change(json.loads((folder / name).read_text()))))
    hash_again(folder)
