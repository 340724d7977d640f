"""The training state in a checkpoint's folder: weights, the optimizer's averages, random state and counters.

    weights ────────────────────▶ shard-00001-model-00001-of-00002.safetensors ─┐
    averages, random state ─────▶ shard-00001-model-00002-of-00002.safetensors ─┼─▶ weights, optimizer, counters
    counters, trainable names ──▶ state.json ───────────────────────────────────┘

torch.distributed.checkpoint shares out the tensors among the ranks and reads them: each rank writes its own slices
(shard_writer.py), for any number of ranks that load them.

AdamW makes its averages for a parameter when that parameter gets its first gradient; a vision tower has none until the
run has seen an image. So the averages do not tell what was trainable: state.json lists the names. A parameter without
averages in the checkpoint has none after the load either, and gets them, with its own step counter, at its first
gradient, as in a run that was never stopped.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from vlmrl.errors import CheckpointError
from vlmrl.models.value_head import is_of_value_head
from vlmrl.trainer.averages import AVERAGE, DECAY, local
from vlmrl.trainer.checkpoint_files import StoredTensor, is_count, read_object, stored_tensors

if TYPE_CHECKING:
    from vlmrl.trainer.shard_writer import ShardWriter

RANDOM = "torch_random_state"
"""Name of the CPU generator's state, uint8 [5056]."""

AVERAGES = ("step", "exp_avg", "exp_avg_sq")
"""AdamW's own names for its state per weight: steps done, running mean of the gradient, and of its square."""

NEVER_NEGATIVE = ("step", "exp_avg_sq")

TRAINABLE = "trainable"
"""The key of state.json that lists the names of the trainable parameters. Older checkpoints have none."""

WEIGHT_DTYPES = ("F32", "BF16", "F16")

REFERENCE = "reference"
"""Stands before the names of the reference's tensors, `reference/<weight>`."""


def not_finite(weights: Mapping[str, Tensor]) -> str | None:
    """The name of the first weight whose values on this rank are not all finite; None where all are finite."""
    return next((name for name, weight in weights.items() if not torch.isfinite(local(weight)).all()), None)


def begin_to_save(
    folder: Path,
    weights: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    trainable: Iterable[str],
    counters: Mapping[str, int],
    process_group: Any = None,
    *,
    reference: Mapping[str, Tensor] | None = None,
) -> Future[None]:
    """Copy the state and begin to write it into `folder`, which exists: the tensors, their hashes and state.json.
    `trainable` are the names of the weights that the optimizer changes, `reference` the tensors of the reference that
    are not in its checkpoint.

    Returns once the copy is made: at the speed of the copy where the host has memory for it, otherwise when what there
    is no memory for is written. The future ends when all ranks have written. All ranks of `process_group` call this,
    and nothing else may use that group. Raises OSError; the future may raise OSError or torch's `CheckpointException`.
    """
    # torch.distributed.checkpoint takes half a second
    from vlmrl.trainer.shard_writer import ShardWriter, parts, room_for_copies, stand_in

    averages: dict[str, Tensor] = {}
    for name, weight in weights.items():
        for average, value in optimizer.state.get(weight, {}).items():
            averages[f"{average}/{name}"] = _as_float(value)
    groups = (weights, {**averages, RANDOM: torch.get_rng_state()}, _named(reference))
    ranks = 1 if process_group is None else process_group.size()
    state = {name: tensor.detach() for group in groups for name, tensor in group.items()}
    writer = ShardWriter(folder, state, parts(groups, ranks), room_for_copies(ranks))
    stand_ins = {name: stand_in(tensor) for name, tensor in state.items()}
    if process_group is None or process_group.rank() == 0:
        (folder / "state.json").write_text(json.dumps({**counters, TRAINABLE: sorted(trainable)}), encoding="utf-8")
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()  # the threads that copy are not in line behind this one's kernels
    thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-state")
    saved = thread.submit(_write, stand_ins, writer, process_group)
    thread.shutdown(wait=False)
    saved.add_done_callback(lambda _: writer.copied.set())
    writer.copied.wait()
    return saved


def restore(
    folder: Path,
    weights: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    trainable: Mapping[str, Tensor],
    counters: Sequence[str],
    process_group: Any = None,
    *,
    reference: Mapping[str, Tensor] | None = None,
) -> dict[str, int]:
    """Restore what `begin_to_save` wrote into `weights`, `optimizer` and `reference` → the counters of the given names.
    `trainable` are the weights that the optimizer changes.

    Raises `CheckpointError`: before anything is changed, where the checkpoint is incomplete or belongs to another model
    or run; later, where its values cannot be continued from (NaN).
    """
    there = stored_tensors(folder)
    counted, names = _read_counters(folder / "state.json", counters)
    _check_weights(folder, there, weights, set(trainable))
    optimized = _optimized(folder, there, trainable)
    _check_trainable(folder, set(optimized), set(trainable), complete=False)
    if names is not None:
        _check_trainable(folder, names, set(trainable), complete=True)
    referred = _named(reference)
    for name, tensor in referred.items():
        _check_kind(folder, there, name, tuple(tensor.shape), WEIGHT_DTYPES)
    random_state = torch.get_rng_state()
    _check_kind(folder, there, RANDOM, tuple(random_state.shape), ("U8",))
    averages = {
        f"{average}/{name}": torch.zeros(1, device=weight.device) if average == "step" else torch.zeros_like(weight)
        for name, weight in trainable.items()
        if name in optimized
        for average in AVERAGES
    }
    if optimizer.param_groups[0].get(DECAY) is not None:
        averages |= {
            f"{AVERAGE}/{name}": torch.zeros_like(trainable[name])
            for name in optimized
            if name in trainable and f"{AVERAGE}/{name}" in there
        }
    state = {name: weight.detach() for name, weight in weights.items()} | averages | {RANDOM: random_state} | referred
    _read(folder, state, process_group)
    _check_values(folder, weights, averages)
    optimizer.state.clear()
    for name in optimized:
        weight = trainable[name]
        step, mean, square = (averages[f"{average}/{name}"].detach() for average in AVERAGES)
        optimizer.state[weight] = {
            "step": step.reshape(()),
            "exp_avg": _kept(optimizer, weight, mean, signed=True),
            "exp_avg_sq": _kept(optimizer, weight, square, signed=False),
        }
        if f"{AVERAGE}/{name}" in averages:
            optimizer.state[weight][AVERAGE] = averages[f"{AVERAGE}/{name}"].detach()
    try:
        torch.set_rng_state(random_state)
    except RuntimeError as error:
        raise CheckpointError(f"{there[RANDOM].path} is damaged ({RANDOM}: {error})") from error
    return counted


def load_weights(folder: Path, weights: Mapping[str, Tensor], *, averaged: bool = False) -> None:
    """Restore only the weights, or with `averaged` their moving averages where they have some: the others have never
    changed. Raises `CheckpointError` where the checkpoint is incomplete, belongs to another model, has no averages, or
    holds a weight that is not finite."""
    there = {name: stored for name, stored in stored_tensors(folder).items() if not is_of_value_head(name)}
    _check_weights(folder, there, weights, set())
    names = {name: f"{AVERAGE}/{name}" if averaged and f"{AVERAGE}/{name}" in there else name for name in weights}
    if averaged and all(name == stored for name, stored in names.items()):
        raise CheckpointError(f"{folder} has no averages of weights: its run had no trainer.ema, or made no step")
    _read(folder, {names[name]: weight.detach() for name, weight in weights.items()}, None)
    _check_values(folder, weights, {})


# ── checks ──────────────────────────────────────────────────────────────────────────────────────────────────


def _read_counters(path: Path, wanted: Sequence[str]) -> tuple[dict[str, int], set[str] | None]:
    """The counters, and the names of the trainable parameters; None where an older version listed none."""
    content = read_object(path)
    for name in wanted:
        if not is_count(content.get(name)):
            raise CheckpointError(f"{path} is damaged ({name} is no number of steps)")
    names = content.get(TRAINABLE)
    if names is None:
        return {name: content[name] for name in wanted}, None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{path} is damaged ({TRAINABLE} is no list of names)")
    return {name: content[name] for name in wanted}, set(names)


def _check_weights(
    folder: Path, there: Mapping[str, StoredTensor], weights: Mapping[str, Tensor], trainable: set[str]
) -> None:
    names = {name for name in there if "/" not in name and name != RANDOM}
    if any(map(is_of_value_head, names)) is not any(map(is_of_value_head, weights)):
        has, lacks = ("has a", "has none") if any(map(is_of_value_head, names)) else ("has no", "has one")
        raise CheckpointError(
            f"{folder} {has} value head and this run {lacks} (algorithm.advantage=gae): resume it with its own "
            "algorithm.advantage"
        )
    if names != set(weights):
        raise CheckpointError(
            f"{folder} belongs to another model: it has {sorted(names - set(weights))[:3]}, which this model has not, "
            f"and lacks {sorted(set(weights) - names)[:3]}."
        )
    for name, weight in weights.items():
        _check_kind(folder, there, name, tuple(weight.shape), WEIGHT_DTYPES[:1] if name in trainable else WEIGHT_DTYPES)


def _optimized(folder: Path, there: Mapping[str, StoredTensor], trainable: Mapping[str, Tensor]) -> list[str]:
    """Names of the trainable weights that have averages, in the model's order."""
    found: dict[str, set[str]] = {}
    for key in there:
        average, is_average, name = key.partition("/")
        if is_average and average != REFERENCE:
            found.setdefault(name, set()).add(average)
    for name, averages in found.items():
        if averages - {AVERAGE} != set(AVERAGES):
            raise CheckpointError(f"{folder} is not a complete checkpoint (it has {sorted(averages)} of {name})")
        if name in trainable:
            _check_kind(folder, there, f"step/{name}", (1,), ("F32",))
            for average in (*AVERAGES[1:], *(averages & {AVERAGE})):
                _check_kind(folder, there, f"{average}/{name}", tuple(trainable[name].shape), ("F32",))
    return [name for name in trainable if name in found] + sorted(found.keys() - trainable.keys())


def _check_trainable(folder: Path, there: set[str], here: set[str], *, complete: bool) -> None:
    """Raise `CheckpointError` where other parameters were trainable. `complete`: `there` is known to be all of them."""
    more, fewer = sorted(there - here), sorted(here - there) if complete else []
    if more or fewer:
        raise CheckpointError(
            f"{folder} belongs to another run: "
            + " and ".join(
                f"{len(names)} parameters that were {then} there are {now} here ({names[0]})"
                for names, then, now in ((more, "trainable", "frozen"), (fewer, "frozen", "trainable"))
                if names
            )
            + "."
        )


def _check_kind(
    folder: Path, there: Mapping[str, StoredTensor], name: str, shape: tuple[int, ...], dtypes: Sequence[str]
) -> None:
    stored = there.get(name)
    if stored is None:
        raise CheckpointError(f"{folder} is not a complete checkpoint ({name} is missing)")
    if stored.shape != shape:
        raise CheckpointError(
            f"{folder} belongs to another model: {name} has shape {stored.shape} there and {shape} here."
        )
    if stored.dtype not in dtypes:
        raise CheckpointError(f"{stored.path} is damaged ({name} is {stored.dtype} instead of {' or '.join(dtypes)})")


def _check_values(folder: Path, weights: Mapping[str, Tensor], averages: Mapping[str, Tensor]) -> None:
    """Raise `CheckpointError` for values on this rank that no step can go on from. An average square may have become
    infinite: AdamW then leaves that weight alone."""
    broken = not_finite(weights)
    for name, tensor in averages.items():
        values = local(tensor)
        sound = values >= 0 if name.startswith(NEVER_NEGATIVE) else ~torch.isnan(values)
        broken = broken or (None if sound.all() else name)
    if broken is not None:
        raise CheckpointError(f"{folder} cannot be continued from: {broken} holds values that are not finite")


def _named(reference: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The tensors of the reference, by their names in the checkpoint."""
    return {f"{REFERENCE}/{name}": tensor.detach() for name, tensor in (reference or {}).items()}


# ── tensors ─────────────────────────────────────────────────────────────────────────────────────────────────


def _write(state: dict[str, Tensor], writer: ShardWriter, process_group: Any) -> None:
    """Share out the tensors that `state` stands for among the ranks, and write them. Raises OSError and torch's
    `CheckpointException`."""
    from torch.distributed.checkpoint.state_dict_saver import save

    _silence_single_process_warning()
    save(state, storage_writer=writer, process_group=process_group, no_dist=process_group is None)


def _read(folder: Path, state: dict[str, Tensor], process_group: Any) -> None:
    """Fill the tensors of `state`. Raises `CheckpointError`."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_loader import load

    from vlmrl.trainer.shard_reader import ShardReader

    _silence_single_process_warning()
    reader = ShardReader(str(folder))
    try:
        load(state, storage_reader=reader, process_group=process_group, no_dist=process_group is None)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder} cannot be read ({error})") from error
    except CheckpointException as error:
        of_a_rank, _ = next(iter(error.failures.values()))
        raise CheckpointError(f"{folder} cannot be read ({of_a_rank})") from error


def _silence_single_process_warning() -> None:
    # torch warns at each save and load of a single process. The filter stays, since a save continues in another thread.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def _as_float(average: Tensor) -> Tensor:
    """The form that is written: [1] for a scalar, float32 for an average that is kept in 8 bits."""
    from torch.distributed.tensor import DTensor

    here = local(average)
    if hasattr(here, "codes"):  # torchao's tensor of 8 bits
        here = here.dequantize()
        if not isinstance(average, DTensor):
            return here
        mesh, placements = average.device_mesh, average.placements
        return DTensor.from_local(here, mesh, placements, run_check=False, shape=average.shape, stride=average.stride())
    return average.reshape(1) if average.dim() == 0 else average


def _kept(optimizer: torch.optim.Optimizer, weight: Tensor, average: Tensor, *, signed: bool) -> Tensor:
    """The form that the optimizer keeps: the inverse of `_as_float`. In 8 bits, an average that is `signed` has other
    code values than one that is never negative."""
    if not hasattr(optimizer, "_new_buffer"):
        return average
    buffer: Tensor = optimizer._new_buffer(weight, signed=signed)
    buffer.copy_(average)
    return buffer
