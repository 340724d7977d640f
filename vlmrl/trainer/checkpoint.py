"""Training state in a folder: weights, optimizer, policy version, random state.

    model.safetensors    the parameters under their transformers names
    optimizer.pt         AdamW's state
    state.json           steps done, sha256 of the two files
    random.pt            torch's random state (sampling has seeds of its own and needs none)

and from the loop (`Checkpoints.save`): loop.json, the evaluations so far.

A checkpoint folder is written under another name and renamed when it is whole (`Checkpoints`), and its hashes
are checked before anything is loaded, so a half-written or damaged one is never taken for one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from vlmrl.errors import CheckpointError
from vlmrl.types import Trainer

FILES = ("model.safetensors", "optimizer.pt", "random.pt")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_training_state(folder: Path, model: Any, optimizer: torch.optim.Optimizer, counters: dict[str, int]) -> None:
    """Write the four files into `folder`, which exists."""
    save_file({name: p.detach().contiguous() for name, p in model.named_parameters()}, folder / "model.safetensors")
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    torch.save(torch.get_rng_state(), folder / "random.pt")
    state = {"counters": counters, "sha256": {name: _sha256(folder / name) for name in FILES}}
    (folder / "state.json").write_text(json.dumps(state, indent=1))


def load_training_state(folder: Path, model: Any, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Restore what `save_training_state` wrote → its counters. Raises `CheckpointError`."""
    try:
        state = json.loads((folder / "state.json").read_text())
        for name in FILES:
            if _sha256(folder / name) != state["sha256"][name]:
                raise CheckpointError(f"{folder / name} is damaged (its sha256 is not the one in state.json)")
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder} is no whole checkpoint: {error}") from error
    weights = load_file(folder / "model.safetensors")
    parameters = dict(model.named_parameters())
    if weights.keys() != parameters.keys():
        raise CheckpointError(
            f"{folder} is of another model: only there {sorted(weights.keys() - parameters.keys())[:3]}, "
            f"missing {sorted(parameters.keys() - weights.keys())[:3]}"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            if weights[name].shape != parameter.shape:
                raise CheckpointError(
                    f"{folder}: {name} has shape {tuple(weights[name].shape)}, the model {tuple(parameter.shape)}"
                )
            parameter.copy_(weights[name])
    optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
    torch.set_rng_state(torch.load(folder / "random.pt", weights_only=True))
    return {name: int(count) for name, count in state["counters"].items()}


class Checkpoints:
    """The checkpoints of one run: whole or absent, the newest `keep` of them."""

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder = folder
        self._keep = keep

    def path(self, step: int) -> Path:
        """`step_000020`."""
        return self._folder / f"step_{step:06d}"

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, ascending."""
        return sorted(int(path.name.removeprefix("step_")) for path in self._folder.glob("step_??????"))

    def save(self, step: int, trainer: Trainer, loop_state: dict[str, Any]) -> None:
        """Write the checkpoint of `step`, then delete those that are too old. Raises `CheckpointError`."""
        partial = self._folder / f"partial_{step:06d}"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            trainer.save(str(partial))
            (partial / "loop.json").write_text(json.dumps(loop_state))
            for path in partial.iterdir():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            shutil.rmtree(self.path(step), ignore_errors=True)
            partial.rename(self.path(step))
        except OSError as error:
            raise CheckpointError(f"{self.path(step)} cannot be written, the run stops: {error}") from error
        for old in self.steps()[: -self._keep]:
            shutil.rmtree(self.path(old))

    def load_newest(self, trainer: Trainer, warn: Callable[[str], None]) -> tuple[int, dict[str, Any]] | None:
        """Restore the newest checkpoint that is whole → its step and loop state; None where there is none at all.

        A damaged one is named by `warn` and the one before it is taken. Raises `CheckpointError` where all are damaged.
        """
        damage: list[str] = []
        for step in reversed(self.steps()):
            try:
                trainer.load(str(self.path(step)))
                state = json.loads((self.path(step) / "loop.json").read_text())
            except (CheckpointError, OSError, ValueError) as error:
                damage.append(str(error))
                continue
            for text in damage:
                warn(f"{text}: continuing from step {step} instead")
            return step, state
        if damage:
            raise CheckpointError("no checkpoint of this run can be loaded: " + "; ".join(damage))
        return None
