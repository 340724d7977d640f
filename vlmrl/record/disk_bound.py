"""Keep rollouts/ and images/ within `monitor.max_rollouts_mib`: delete the oldest files, and images that none shows.

    a file was written ─▶ too many bytes? ─▶ deleted_rollouts.json ─▶ the oldest files ─▶ images that no file names

Training steps go first, the oldest before the others, then evaluations in the same order: a run has far fewer of them,
and they are what runs are compared by. The newest file of either kind stays, however large it is. faults.jsonl stays
whole, so a fault is still listed when its rollout is gone.

The note is written before the files are deleted, so that a killed run never lacks files without saying so. Nothing is
deleted in a folder that is a link: it may belong to other runs as well.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import orjson

from vlmrl.record.files import disk_errors, read_json, write_bytes_atomically
from vlmrl.record.run_dir import RecordKind, RunDir

log = logging.getLogger(__name__)

MIB = 2**20
IMAGE_NAME = re.compile(r"([0-9a-f]{32})\.png")
KINDS: tuple[RecordKind, ...] = ("step", "eval")
"""The kinds of files, in the order in which they are deleted."""


@dataclass(frozen=True)
class DeletedRollouts:
    """deleted_rollouts.json: which files of rollouts/ a run has deleted itself."""

    max_rollouts_mib: int
    """`monitor.max_rollouts_mib` when it did."""
    step: int | None = None
    """The training steps up to this one are deleted; None: no step is."""
    eval: int | None = None
    """The evaluations after the steps up to this one are deleted."""

    def says(self) -> str:
        """What is missing, as a sentence without its subject.

        >>> DeletedRollouts(64, step=40).says()
        'deleted the rollouts of the training steps up to 40, because monitor.max_rollouts_mib=64'
        """
        kinds = [(self.step, "training steps up to"), (self.eval, "evaluations up to step")]
        what = " and of the ".join(f"{kind} {step}" for step, kind in kinds if step is not None)
        return f"deleted the rollouts of the {what}, because monitor.max_rollouts_mib={self.max_rollouts_mib}"

    def covers(self, kind: RecordKind, step: int) -> bool:
        """Whether the file of this step was deleted, if it is not there."""
        last = self.step if kind == "step" else self.eval
        return last is not None and step <= last


def read_deleted(run_dir: RunDir) -> DeletedRollouts | None:
    """Which rollouts a run has deleted itself; None where it has deleted none."""
    content = read_json(run_dir.deleted_rollouts, _is_note, log.warning)
    return None if content is None else DeletedRollouts(**content)


def _is_note(content: Any) -> bool:
    def is_count(value: Any) -> bool:
        return type(value) is int and value >= 0

    return (
        isinstance(content, dict)
        and content.keys() == {"max_rollouts_mib", "step", "eval"}
        and is_count(content["max_rollouts_mib"])
        and all(content[kind] is None or is_count(content[kind]) for kind in ("step", "eval"))
    )


@dataclass
class _File:
    """A file of rollouts on the disk."""

    size: int
    hashes: set[str] | None = None
    """The images that it shows; None while it has not been looked at."""


class DiskBound:
    """Deletes the oldest files of a run that is writing. Used by one thread."""

    def __init__(self, run_dir: RunDir, max_mib: int) -> None:
        self._run_dir = run_dir
        self._max_mib = max_mib
        self._files: dict[tuple[RecordKind, int], _File] = {}
        self._images: dict[str, int] = {}
        """Hash → bytes of its file."""
        self._bytes = 0
        self._is_known = False
        self._is_linked = False
        self._deleted = read_deleted(run_dir)

    def resume_at(self, step: int) -> None:
        """Files of steps after `step` were removed, and are written again. Raises VlmrlError."""
        self._is_known = False
        if self._deleted is not None:
            before = self._deleted
            self._note(replace(before, step=_least(before.step, step), eval=_least(before.eval, step)))

    def wrote(self, kind: RecordKind, step: int, hashes: Iterable[str]) -> None:
        """Count a file that was just written, with the images that it shows; then delete what is too much. Raises
        VlmrlError."""
        path = self._run_dir.rollouts_file(kind, step)
        with disk_errors(path):
            if not self._is_known:
                self._look()
            before = self._files.get((kind, step), _File(0))
            self._files[kind, step] = _File(path.stat().st_size, set(hashes))
            self._bytes += self._files[kind, step].size - before.size
            for hash in hashes:
                if hash not in self._images:
                    self._images[hash] = self._run_dir.image(hash).stat().st_size
                    self._bytes += self._images[hash]
        if self._bytes > self._max_mib * MIB and not self._is_linked:
            self._delete()

    def _look(self) -> None:
        """Find what the run has written before. Raises OSError."""
        folders = self._run_dir.rollouts, self._run_dir.images
        self._is_linked = any(folder.is_symlink() for folder in folders)
        if self._is_linked:
            log.warning("monitor.max_rollouts_mib has no effect, because rollouts/ or images/ is a link")
        self._files = {
            (kind, step): _File(path.stat().st_size)
            for kind in KINDS
            for step in self._run_dir.rollouts_steps(kind)
            if (path := self._run_dir.rollouts_file(kind, step)).exists()
        }
        names = ((IMAGE_NAME.fullmatch(path.name), path) for path in self._run_dir.images.iterdir())
        self._images = {name[1]: path.stat().st_size for name, path in names if name}
        self._bytes = sum(file.size for file in self._files.values()) + sum(self._images.values())
        self._is_known = True

    def _delete(self) -> None:
        """Delete the oldest files until the rest fits, and the images that no other file shows."""
        uses = self._uses()
        unused = [hash for hash in self._images if hash not in uses]
        self._bytes -= sum(map(self._images.pop, unused))
        gone: dict[RecordKind, list[int]] = {"step": [], "eval": []}
        for key in self._oldest_first():
            if self._bytes <= self._max_mib * MIB:
                break
            kind, step = key
            gone[kind].append(step)
            file = self._files.pop(key)
            self._bytes -= file.size
            uses.subtract(file.hashes or ())
            last = [hash for hash in file.hashes or () if uses[hash] == 0]
            self._bytes -= sum(self._images.pop(hash, 0) for hash in last)
            unused += last
        if any(gone.values()):
            before = self._deleted or DeletedRollouts(self._max_mib)
            newest = {kind: max(steps, default=None) for kind, steps in gone.items()}
            self._note(
                DeletedRollouts(
                    self._max_mib, step=_most(before.step, newest["step"]), eval=_most(before.eval, newest["eval"])
                )
            )
        paths = [self._run_dir.rollouts_file(kind, step) for kind, steps in gone.items() for step in steps]
        for path in (*paths, *map(self._run_dir.image, unused)):
            with disk_errors(path):
                path.unlink(missing_ok=True)

    def _oldest_first(self) -> list[tuple[RecordKind, int]]:
        """The files that may be deleted: all but the newest of each kind."""
        return [key for kind in KINDS for key in sorted(key for key in self._files if key[0] == kind)[:-1]]

    def _uses(self) -> Counter[str]:
        """Hash → number of files that show the image. A file that cannot be read shows none."""
        from vlmrl.record.rollout_rows import image_hashes  # pyarrow takes 0.4 s

        for key, file in self._files.items():
            if file.hashes is None:
                file.hashes = image_hashes(self._run_dir.rollouts_file(*key))
        return Counter(hash for file in self._files.values() for hash in file.hashes or ())

    def _note(self, deleted: DeletedRollouts) -> None:
        with disk_errors(self._run_dir.deleted_rollouts):
            write_bytes_atomically(self._run_dir.deleted_rollouts, orjson.dumps(asdict(deleted)))
        if self._deleted is None:
            log.info("the run %s", deleted.says())
        self._deleted = deleted


def _least(last: int | None, step: int) -> int | None:
    """The last deleted step once those after `step` are to be written again; None where no earlier one is deleted."""
    return None if last is None or step < 0 else min(last, step)


def _most(a: int | None, b: int | None) -> int | None:
    return max((each for each in (a, b) if each is not None), default=None)
