"""Training state in a folder: weights, optimizer, policy version, random state.

    model.safetensors    the parameters under their transformers names
    optimizer.pt         AdamW's state
    state.json           policy version, sha256 of the two files
    random.pt            torch's random state (sampling has seeds of its own and needs none)

A checkpoint folder is written under another name and renamed when it is whole (see monitor.run_dir), and its hashes
are checked before anything is loaded, so a half-written or damaged one is never taken for one.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from vlmrl.errors import CheckpointError

FILES = ("model.safetensors", "optimizer.pt", "random.pt")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_training_state(folder: Path, model: Any, optimizer: torch.optim.Optimizer, version: int) -> None:
    """Write the four files into `folder`, which exists."""
    save_file({name: p.detach().contiguous() for name, p in model.named_parameters()}, folder / "model.safetensors")
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    torch.save(torch.get_rng_state(), folder / "random.pt")
    state = {"version": version, "sha256": {name: _sha256(folder / name) for name in FILES}}
    (folder / "state.json").write_text(json.dumps(state, indent=1))


def load_training_state(folder: Path, model: Any, optimizer: torch.optim.Optimizer) -> int:
    """Restore what `save_training_state` wrote → the policy version. Raises `CheckpointError`."""
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
    return int(state["version"])
