"""Checkpoints: the training state of a run in a folder that is either complete or absent.

    shard-00001-model-00001-of-00002.safetensors   rank 0's slices of the weights, under their transformers names;
                                                   trainable ones in float32, frozen ones in the model's dtype
    shard-00001-model-00002-of-00002.safetensors   rank 0's slices of the optimizer's averages, `<average>/<weight>`,
                                                   and torch's random state (sampling has its own seeds)
    shard-00002-…                                  the slices of rank 1
    state.json                                     step counters and the loss scale
    loop.json                                      the loop's state (`Checkpoints.save`): the evaluations so far
    sha256.json                                    the hash of each file above, written last

torch.distributed.checkpoint writes and reads the tensors. Each file states which part of a tensor it holds, so any
number of ranks can load what any other number wrote. The state is copied into the host's memory and written from there
while the next steps run.

A checkpoint is written under a temporary name and renamed when it is complete; it is renamed again before it is
deleted; and its hashes are checked before anything is loaded. So an incomplete or damaged folder is never loaded,
whenever the process was killed. The files contain no pickle, so loading a checkpoint from a stranger runs no code.

Left out on purpose: AdamW's settings (learning rate, betas, weight decay). They come from the config, so a resumed run
may change them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor

from vlmrl.errors import CheckpointError
from vlmrl.types import Trainer

RANDOM = "torch_random_state"
"""Name of the CPU generator's state, uint8 [5056]."""

AVERAGES = ("step", "exp_avg", "exp_avg_sq")
"""AdamW's own names for its state per weight: steps done, running mean of the gradient, and of its square."""

HASHES = "sha256.json"

HASHING_THREADS = 8

MODEL_FILE, OPTIMIZER_FILE = 1, 2


def not_finite(weights: Mapping[str, Tensor]) -> str | None:
    """The name of the first weight whose values on this rank are not all finite; None where all are finite."""
    return next((name for name, weight in weights.items() if not torch.isfinite(_local(weight)).all()), None)


def begin_to_save(
    folder: Path,
    weights: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    counters: Mapping[str, int],
    process_group: Any = None,
) -> Future[None]:
    """Copy the state and begin to write it into `folder`, which exists: all files but loop.json and sha256.json.

    The future ends when all ranks have written. All ranks of `process_group` call this, and nothing else may use that
    group. Raises OSError; the future may raise OSError or torch's `CheckpointException`.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import async_save

    averages: dict[str, Tensor] = {}
    for name, weight in weights.items():
        for average, value in optimizer.state.get(weight, {}).items():
            averages[f"{average}/{name}"] = _as_float(value)
    optimizer_state = {**averages, RANDOM: torch.get_rng_state()}
    writer = HuggingFaceStorageWriter(
        str(folder),
        fqn_to_index_mapping=dict.fromkeys(weights, MODEL_FILE) | dict.fromkeys(optimizer_state, OPTIMIZER_FILE),
        save_distributed=True,
    )
    if process_group is None or process_group.rank() == 0:
        (folder / "state.json").write_text(json.dumps(counters))
    state = {name: weight.detach() for name, weight in weights.items()} | optimizer_state
    _silence_single_process_warning()
    saved: Any = async_save(state, storage_writer=writer, process_group=process_group)
    future: Future[None] = saved
    return future


def restore(
    folder: Path,
    weights: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    trainable: Mapping[str, Tensor],
    process_group: Any = None,
) -> dict[str, int]:
    """Restore what `begin_to_save` wrote into `weights` and `optimizer` → the counters. `trainable` are the weights
    that the optimizer changes.

    Raises `CheckpointError`, before anything is changed, where the checkpoint belongs to another model.
    """
    there = _shapes(folder)
    names = {name for name in there if "/" not in name and name != RANDOM}
    _check_names(folder, names, weights)
    for name, weight in weights.items():
        if there[name] != weight.shape:
            raise CheckpointError(
                f"{folder} belongs to another model: {name} has shape {tuple(there[name])} there and "
                f"{tuple(weight.shape)} here."
            )
    optimized = {name.partition("/")[2] for name in there if "/" in name}
    if optimized and optimized != set(trainable):
        raise CheckpointError(
            f"{folder} belongs to another run: {len(optimized)} parameters were trainable there, {len(trainable)} are "
            "trainable here."
        )
    random_state = torch.get_rng_state()
    averages = {
        f"{average}/{name}": torch.zeros(1, device=weight.device) if average == "step" else torch.zeros_like(weight)
        for name, weight in trainable.items()
        for average in AVERAGES
        if optimized
    }
    state = {name: weight.detach() for name, weight in weights.items()} | averages | {RANDOM: random_state}
    _read(folder, state, process_group)
    optimizer.state.clear()
    for name, weight in trainable.items():
        if optimized:
            step, mean, square = (averages[f"{average}/{name}"].detach() for average in AVERAGES)
            optimizer.state[weight] = dict(
                zip(
                    AVERAGES,
                    (step.reshape(()), _kept(optimizer, weight, mean), _kept(optimizer, weight, square)),
                    strict=True,
                )
            )
    torch.set_rng_state(random_state)
    counters = json.loads((folder / "state.json").read_text())
    return {name: int(count) for name, count in counters.items()}


def load_weights(folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Restore only the weights. Raises `CheckpointError` where the checkpoint belongs to another model."""
    there = _shapes(folder)
    _check_names(folder, {name for name in there if "/" not in name and name != RANDOM}, weights)
    _read(folder, {name: weight.detach() for name, weight in weights.items()}, None)


def _check_names(folder: Path, there: set[str], weights: Mapping[str, Tensor]) -> None:
    if there != set(weights):
        raise CheckpointError(
            f"{folder} belongs to another model: it has {sorted(there - set(weights))[:3]}, which this model has not, "
            f"and lacks {sorted(set(weights) - there)[:3]}."
        )


def _shapes(folder: Path) -> dict[str, torch.Size]:
    """The whole shape of every tensor in the checkpoint, by name."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: metadata.size for name, metadata in found.items()}  # type: ignore[union-attr]


def _read(folder: Path, state: dict[str, Tensor], process_group: Any) -> None:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    _silence_single_process_warning()
    reader = HuggingFaceStorageReader(str(folder))
    load(state, storage_reader=reader, process_group=process_group, no_dist=process_group is None)


def _silence_single_process_warning() -> None:
    # torch warns at each save and load of a single process. The filter stays, since a save continues in another thread.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def _local(tensor: Tensor) -> Tensor:
    """This rank's slice, without gradient."""
    found: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return found.detach()


def _as_float(average: Tensor) -> Tensor:
    """The form that is written: [1] for a scalar, float32 for an average that is kept in 8 bits."""
    if hasattr(average, "dequantize") and type(average) is not Tensor and hasattr(average, "codes"):
        average = average.dequantize()
    return average.reshape(1) if average.dim() == 0 else average


def _kept(optimizer: torch.optim.Optimizer, weight: Tensor, average: Tensor) -> Tensor:
    """The form that the optimizer keeps: the inverse of `_as_float`."""
    if average.shape != weight.shape:
        return average.reshape(())  # the step counter
    if not hasattr(optimizer, "_new_buffer"):
        return average
    buffer: Tensor = optimizer._new_buffer(weight, signed=True)
    buffer.copy_(average)
    return buffer


class Loads(Protocol):
    """An object that a checkpoint can be loaded into."""

    def load(self, folder: str) -> None:
        """See `vlmrl.types.Trainer.load`."""
        ...


class Checkpoints:
    """The newest `keep` checkpoints of one run. One is written at a time, in the background."""

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder = folder
        self._keep = keep
        self._background = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def path(self, step: int) -> Path:
        """The folder of a step's checkpoint, e.g. `step_000020`."""
        return self._folder / f"step_{step:06d}"

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, ascending."""
        names = (path.name.removeprefix("step_") for path in self._folder.glob("step_*"))
        return sorted(int(name) for name in names if name.isdigit())

    def save(self, step: int, trainer: Trainer, loop_state: dict[str, Any]) -> None:
        """Copy the state after `step` and begin to write it. Once it is complete, delete checkpoints beyond `keep`.

        Waits until the previous checkpoint is written. Raises `CheckpointError` where that one or this one cannot be
        written, and `NonFiniteLossError` where a weight is not finite: such a checkpoint would replace the last one
        from which the run can be continued.
        """
        self.finish()
        partial = self._folder / f"partial_{step:06d}"
        try:
            for left_behind in self._folder.glob("partial_*"):  # left by a process that was killed
                shutil.rmtree(left_behind)
            partial.mkdir(parents=True)
            (partial / "loop.json").write_text(json.dumps(loop_state))
            written = trainer.save(str(partial))
        except OSError as error:
            raise self._cannot_be_written(step, error) from error
        self._pending = self._background.submit(self._complete, step, partial, written)

    def check(self) -> None:
        """Raise `CheckpointError` if writing the current checkpoint has failed by now; return at once otherwise."""
        if self._pending is not None and self._pending.done():
            self.finish()

    def finish(self) -> None:
        """Wait until the current checkpoint is on the disk. Raises `CheckpointError` where it cannot be written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _complete(self, step: int, partial: Path, written: Future[None]) -> None:
        from torch.distributed.checkpoint.api import CheckpointException

        try:
            written.result()
            (partial / HASHES).write_text(json.dumps(_hashes(partial), indent=1))
            for path in partial.iterdir():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            if self.path(step).exists():
                self._delete(step)
            partial.rename(self.path(step))
            for old in self.steps()[: -self._keep]:
                self._delete(old)
        except (OSError, SafetensorError) as error:
            raise self._cannot_be_written(step, error) from error
        except CheckpointException as error:
            of_a_rank, _ = next(iter(error.failures.values()))
            raise self._cannot_be_written(step, of_a_rank) from error

    def _cannot_be_written(self, step: int, error: BaseException) -> CheckpointError:
        return CheckpointError(
            f"{self.path(step)} cannot be written, so the run stops, since it could not be resumed from here: {error}"
        )

    def load(self, step: int, trainer: Loads) -> None:
        """Restore the checkpoint of `step`. Raises `CheckpointError`."""
        check_hashes(self.path(step))
        trainer.load(str(self.path(step)))

    def load_newest(self, trainer: Loads, warn: Callable[[str], None]) -> tuple[int, dict[str, Any]] | None:
        """Restore the newest undamaged checkpoint → its step and loop state; None where there is no checkpoint at all.

        Each damaged one is reported through `warn`, and the one before it is tried. Raises `CheckpointError` where all
        are damaged.
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
    """Raise `CheckpointError` unless every file of the checkpoint has the hash that was recorded for it."""
    try:
        expected = json.loads((folder / HASHES).read_bytes())
        found = _hashes(folder)
        for name in expected:
            if name not in found:
                raise CheckpointError(f"{folder} is not a complete checkpoint ({folder / name} is missing)")
            if found[name] != expected[name]:
                raise CheckpointError(f"{folder / name} is damaged (its SHA-256 differs from the one in {HASHES})")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} is not a complete checkpoint ({error})") from error


def _hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file except `HASHES`, by name."""
    paths = sorted(path for path in folder.iterdir() if path.name != HASHES)
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        return {path.name: digest for path, digest in zip(paths, pool.map(_sha256, paths), strict=True)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
