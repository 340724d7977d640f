"""Training state in a folder: whole, or not there.

    model.safetensors        the parameters under their transformers names
    optimizer.safetensors    AdamW's averages, `<index of the parameter>/<average>`, and torch's random state
                             (sampling has seeds of its own and needs none)
    state.json               steps done
    loop.json                what the loop wants back (`Checkpoints.save`): the evaluations so far
    sha256.json              of each of these, written last

A checkpoint is written under another name and renamed when it is whole, taken out of sight before it is deleted, and
its hashes are checked before anything is loaded: a half-written or damaged one is never taken for one, whenever the
process was killed. No pickle: a checkpoint from elsewhere cannot run code.

Left out on purpose: AdamW's settings (rate, betas, weight decay). They are the config's, so a resumed run may change
them.
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
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vlmrl.errors import CheckpointError, NonFiniteLossError
from vlmrl.types import Trainer

RANDOM = "torch_random_state"
"""Key in optimizer.safetensors; uint8 [5056], of the CPU generator."""

HASHES = "sha256.json"


def save_training_state(folder: Path, model: Any, optimizer: torch.optim.Optimizer, counters: dict[str, int]) -> None:
    """Write the first three files into `folder`, which exists. Raises OSError, SafetensorError, and
    `NonFiniteLossError` for weights that cannot be continued from: they would push out the last that can."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise NonFiniteLossError(
                f"{name} holds values that are not finite, so this policy is not saved: continue from the checkpoint "
                "before it, with a lower trainer.learning_rate"
            )
    save_file({name: p.detach().contiguous() for name, p in model.named_parameters()}, folder / "model.safetensors")
    averages = {
        f"{index}/{name}": value.contiguous()
        for index, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }
    save_file({**averages, RANDOM: torch.get_rng_state()}, folder / "optimizer.safetensors")
    (folder / "state.json").write_text(json.dumps(counters))


def load_training_state(folder: Path, model: Any, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Restore what `save_training_state` wrote → its counters.

    Raises `CheckpointError` where it is of another model; then nothing was changed.
    """
    weights = load_file(folder / "model.safetensors")
    parameters = dict(model.named_parameters())
    if weights.keys() != parameters.keys():
        raise CheckpointError(
            f"{folder} is of another model: only there {sorted(weights.keys() - parameters.keys())[:3]}, "
            f"missing {sorted(parameters.keys() - weights.keys())[:3]}"
        )
    for name, parameter in parameters.items():
        if weights[name].shape != parameter.shape:
            raise CheckpointError(
                f"{folder} is of another model: {name} has shape {tuple(weights[name].shape)} there and "
                f"{tuple(parameter.shape)} here"
            )
    averages = load_file(folder / "optimizer.safetensors")
    random_state = averages.pop(RANDOM)
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in averages.items():
        index, _, name = key.partition("/")
        state.setdefault(int(index), {})[name] = value
    learning = sum(len(group["params"]) for group in optimizer.param_groups)
    if state and len(state) != learning:
        raise CheckpointError(f"{folder} is of another run: {len(state)} parameters learned there, {learning} do here")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    torch.set_rng_state(random_state)
    counters = json.loads((folder / "state.json").read_text())
    return {name: int(count) for name, count in counters.items()}


class Checkpoints:
    """The checkpoints of one run, the newest `keep` of them."""

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder = folder
        self._keep = keep

    def path(self, step: int) -> Path:
        """`step_000020`."""
        return self._folder / f"step_{step:06d}"

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, ascending."""
        names = (path.name.removeprefix("step_") for path in self._folder.glob("step_*"))
        return sorted(int(name) for name in names if name.isdigit())

    def save(self, step: int, trainer: Trainer, loop_state: dict[str, Any]) -> None:
        """Write the checkpoint of `step`, then delete those that are too old.

        Raises `CheckpointError`, and `NonFiniteLossError` where the weights are not finite.
        """
        try:
            for left_behind in self._folder.glob("partial_*"):  # by a run that was killed
                shutil.rmtree(left_behind)
            partial = self._folder / f"partial_{step:06d}"
            partial.mkdir(parents=True)
            trainer.save(str(partial))
            (partial / "loop.json").write_text(json.dumps(loop_state))
            hashes = {path.name: _sha256(path) for path in sorted(partial.iterdir())}
            (partial / HASHES).write_text(json.dumps(hashes, indent=1))
            for path in partial.iterdir():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            if self.path(step).exists():
                self._delete(step)
            partial.rename(self.path(step))
            for old in self.steps()[: -self._keep]:
                self._delete(old)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{self.path(step)} cannot be written, so the run stops rather than go on without: {error}"
            ) from error

    def load(self, step: int, trainer: Trainer) -> None:
        """Restore the checkpoint of `step`. Raises `CheckpointError`."""
        check_hashes(self.path(step))
        trainer.load(str(self.path(step)))

    def load_newest(self, trainer: Trainer, warn: Callable[[str], None]) -> tuple[int, dict[str, Any]] | None:
        """Restore the newest checkpoint that is whole → its step and loop state; None where there is none at all.

        A damaged one is named by `warn` and the one before it is taken. Raises `CheckpointError` where all are damaged.
        """
        damage: list[str] = []
        for step in reversed(self.steps()):
            try:
                self.load(step, trainer)
            except CheckpointError as error:
                damage.append(str(error))
                continue
            for text in damage:
                warn(f"{text}: continuing from step {step} instead")
            return step, json.loads((self.path(step) / "loop.json").read_text())
        if damage:
            raise CheckpointError("no checkpoint of this run can be loaded: " + "; ".join(damage))
        return None

    def _delete(self, step: int) -> None:
        gone = self._folder / f"partial_{step:06d}_deleted"
        self.path(step).rename(gone)
        shutil.rmtree(gone)


def check_hashes(folder: Path) -> None:
    """Raise `CheckpointError` unless every file of the checkpoint is what was written."""
    try:
        for name, expected in json.loads((folder / HASHES).read_bytes()).items():
            if _sha256(folder / name) != expected:
                raise CheckpointError(f"{folder / name} is damaged (its SHA-256 is not the one in {HASHES})")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} is no whole checkpoint ({error})") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
