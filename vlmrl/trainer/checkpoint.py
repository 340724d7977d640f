"""Checkpoints: the training state of a run in a folder that is either complete or absent.

    shard-00001-model-00001-of-00002.safetensors   rank 0's slices of the weights, under their transformers names;
                                                   trainable ones in float32, frozen ones in the model's dtype
    shard-00001-model-00002-of-00002.safetensors   rank 0's slices of the optimizer's averages, `<average>/<weight>`,
                                                   and torch's random state (sampling has its own seeds)
    shard-00002-…                                  the slices of rank 1; of both kinds as many files as their size asks
                                                   for (shard_writer.py)
    state.json                                     step counters, the loss scale, names of the trainable parameters
    loop.json                                      the evaluations, and the position in the data (loop_state.py)
    sha256.json                                    the hash of each file above, written last

Each file states which part of a tensor it holds, so any number of ranks can load what any other number wrote
(training_state.py). The state is copied into the host's memory and written from there while the next steps run
(tensor_files.py).

A checkpoint is written under a temporary name and renamed when it is complete; it is renamed again before it is
deleted; and its hashes are checked before anything is loaded (checkpoint_files.py). So an incomplete or damaged folder
is never loaded, whenever the process was killed. The files contain no pickle, so loading a checkpoint from a stranger
runs no code.

Left out on purpose: AdamW's settings (learning rate, betas, weight decay). They come from the config, so a resumed run
may change them.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from safetensors import SafetensorError

from vlmrl.errors import CheckpointError
from vlmrl.record.files import write_bytes_atomically
from vlmrl.record.run_dir import BEST_CHECKPOINT
from vlmrl.trainer.checkpoint_files import check_hashes, hash_the_rest
from vlmrl.trainer.loop_state import Best, LoopState
from vlmrl.types import Trainer


class Loads(Protocol):
    """An object that a checkpoint can be loaded into."""

    def load(self, folder: str) -> None:
        """See `vlmrl.types.Trainer.load`."""
        ...


class Checkpoints:
    """The newest `keep` checkpoints of one run, and the best one (`LoopState.best`). One is written at a time, in the
    background."""

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder = folder
        self._keep = keep
        self._pending: Future[None] | None = None
        self._background: ThreadPoolExecutor | None = None
        """The thread of the current checkpoint; it ends with it."""

    def path(self, step: int) -> Path:
        """The folder of a step's checkpoint, e.g. `step_000020`."""
        return self._folder / f"step_{step:06d}"

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, ascending."""
        names = {path.name for path in self._folder.glob("step_*") if path.is_dir()}
        steps = {int(name.removeprefix("step_")) for name in names if name.removeprefix("step_").isdecimal()}
        return sorted(step for step in steps if self.path(step).name in names)

    def save(
        self, step: int, trainer: Trainer, loop_state: LoopState, recorded: Callable[[], object] = lambda: None
    ) -> None:
        """Copy the state after `step` and begin to write it. Once it is complete, delete checkpoints beyond `keep`.

        `recorded` is called in the background before the checkpoint is complete. It waits until what the run has
        recorded up to `step` is on the disk, so that a run which continues from here has all of it; where it raises, so
        do `check` and `finish`.

        Waits until the previous checkpoint is written. Raises `CheckpointError` where that one or this one cannot be
        written, and `NonFiniteLossError` where a weight is not finite: such a checkpoint would replace the last one
        from which the run can be continued.
        """
        self.finish()
        partial = self._folder / f"partial_{step:06d}"
        try:
            self._remove_leftovers()
            partial.mkdir(parents=True)
            loop_state.write(partial / "loop.json")
            written = trainer.save(str(partial))
        except OSError as error:
            raise self._cannot_be_written(step, error) from error
        self._background = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending = self._background.submit(self._complete, step, partial, written, loop_state.best, recorded)

    def tidy(self, step: int, best: Best | None) -> None:
        """Finish what a process that was killed had begun after its checkpoint was complete: delete checkpoints that
        are half written, half deleted or beyond `keep`, and write best.json. The checkpoint of `step` stays.

        A run that continues may have no further step to save, so this is not left to `save`. Raises `CheckpointError`
        where a file cannot be written or deleted.
        """
        try:
            self._remove_leftovers()
            self._keep_newest(best, step)
        except OSError as error:
            raise CheckpointError(
                f"{self._folder} cannot be changed, so the run stops, since it could not save a checkpoint either: "
                f"{error}"
            ) from error

    def check(self) -> None:
        """Raise `CheckpointError` if writing the current checkpoint has failed by now; return at once otherwise."""
        if self._pending is not None and self._pending.done():
            self.finish()

    def finish(self) -> None:
        """Wait until the current checkpoint is on the disk. Raises `CheckpointError` where it cannot be written."""
        pending, self._pending = self._pending, None
        background, self._background = self._background, None
        if background is not None:
            background.shutdown()
        if pending is not None:
            pending.result()

    def _complete(
        self, step: int, partial: Path, written: Future[None], best: Best | None, recorded: Callable[[], object]
    ) -> None:
        from torch.distributed.checkpoint.api import CheckpointException

        try:
            written.result()
            hash_the_rest(partial)
            for path in partial.iterdir():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            recorded()
            replaced = self._set_aside(step) if self.path(step).exists() else None
            partial.rename(self.path(step))
            if replaced is not None:
                _remove(replaced)
            self._keep_newest(best, step)
        except (OSError, SafetensorError) as error:
            raise self._cannot_be_written(step, error) from error
        except CheckpointException as error:
            of_a_rank, _ = next(iter(error.failures.values()))
            raise self._cannot_be_written(step, of_a_rank) from error

    def _remove_leftovers(self) -> None:
        """Delete what processes that were killed left under a temporary name."""
        for left_behind in self._folder.glob("partial_*"):
            _remove(left_behind)

    def _keep_newest(self, best: Best | None, step: int) -> None:
        """Delete checkpoints beyond `keep`, except the best one and the one of `step`."""
        if best is not None:
            self._note_best(best)
        for old in self.steps()[: -self._keep]:
            if old != step and (best is None or old != best.step):
                _remove(self._set_aside(old))

    def _note_best(self, best: Best) -> None:
        """Write best.json where it does not say this yet, before any older checkpoint is deleted."""
        content = {"step": best.step, "metric": best.metric, "value": best.value, "folder": self.path(best.step).name}
        written = (json.dumps(content) + "\n").encode()
        path = self._folder / BEST_CHECKPOINT
        if self.path(best.step).is_dir() and not (path.exists() and path.read_bytes() == written):
            write_bytes_atomically(path, written)

    def _cannot_be_written(self, step: int, error: BaseException) -> CheckpointError:
        return CheckpointError(
            f"{self.path(step)} cannot be written, so the run stops, since it could not be resumed from here: {error}"
        )

    def load(self, step: int, trainer: Loads) -> LoopState:
        """Restore the checkpoint of `step` → its loop state. Raises `CheckpointError`."""
        try:
            return self._load(step, trainer)
        except CheckpointError as error:
            raise CheckpointError(
                f"{str(error).rstrip('.')}, so it cannot be loaded: put {self.path(step)} back from a copy, or choose "
                "another checkpoint"
            ) from error

    def _load(self, step: int, trainer: Loads) -> LoopState:
        check_hashes(self.path(step))
        loop_state = LoopState.read(self.path(step) / "loop.json")
        trainer.load(str(self.path(step)))
        return loop_state

    def load_chosen(
        self, step: int | None, trainer: Loads, warn: Callable[[str], None]
    ) -> tuple[int, LoopState] | None:
        """Restore the checkpoint of `step`, or the newest undamaged one where `step` is None."""
        return self.load_newest(trainer, warn) if step is None else (step, self.load(step, trainer))

    def load_newest(self, trainer: Loads, warn: Callable[[str], None]) -> tuple[int, LoopState] | None:
        """Restore the newest undamaged checkpoint → its step and loop state; None where there is no checkpoint at all.

        Each damaged one is reported through `warn`, and the one before it is tried. Raises `CheckpointError` where all
        are damaged.
        """
        damage: list[str] = []
        for step in reversed(self.steps()):
            try:
                loop_state = self._load(step, trainer)
            except CheckpointError as error:
                damage.append(str(error))
                continue
            for text in damage:
                warn(f"{text.rstrip('.')}: continuing from step {step} instead")
            return step, loop_state
        if damage:
            raise CheckpointError(
                f"no checkpoint of this run can be loaded: {'; '.join(text.rstrip('.') for text in damage)}. Put back "
                f"{self._folder} from a copy, or start a new run."
            )
        return None

    def _set_aside(self, step: int) -> Path:
        """Take its name from a checkpoint that is to be deleted → the new path."""
        gone = self._folder / f"partial_{step:06d}_deleted"
        self.path(step).rename(gone)
        return gone


def _remove(path: Path) -> None:
    """Delete a folder or a file. A link is deleted, not what it points to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
