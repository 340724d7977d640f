"""Files and folders that are removed, replaced or changed while a run writes to them are noticed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from vlmrl.errors import VlmrlError
from vlmrl.record.faults import FaultLog, FaultRecord
from vlmrl.record.in_place import Folders
from vlmrl.record.metrics import MetricsLog

FAULT: FaultRecord = {
    "step": 1,
    "phase": "rl",
    "rollout_id": "train/000001/00/00",
    "problem_id": "row 1",
    "split": "train",
    "problem_index": 1,
    "stop_reason": "task_error",
    "error": "KeyError",
    "traceback": None,
}


def replaced(path: Path) -> None:
    """As an editor saves: the same content under the same name, in another file."""
    copy = shutil.copy(path, path.with_name("copy"))
    Path(copy).replace(path)


CHANGES: dict[str, Callable[[Path], object]] = {
    "removed": Path.unlink,
    "replaced": replaced,
    "emptied": lambda path: path.write_bytes(b""),
    "appended to": lambda path: path.write_bytes(path.read_bytes() + b"{}\n"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_is_not_as_it_was_written(change: str, tmp_path: Path) -> None:
    metrics, faults = MetricsLog(tmp_path / "metrics.jsonl"), FaultLog(tmp_path / "faults.jsonl")
    for step in (1, 2):
        metrics.write({"step": step})
        faults.write([FAULT])
        metrics.check_in_place()
        faults.check_in_place()
    for path in (tmp_path / "metrics.jsonl", tmp_path / "faults.jsonl"):
        CHANGES[change](path)
    with pytest.raises(VlmrlError, match=r"metrics\.jsonl was removed, replaced or changed"):
        metrics.check_in_place()
    with pytest.raises(VlmrlError, match=r"faults\.jsonl was removed, replaced or changed"):
        faults.check_in_place()
    metrics.close()


def test_a_link_to_the_file_is_the_file(tmp_path: Path) -> None:
    metrics = MetricsLog(tmp_path / "metrics.jsonl")
    metrics.write({"step": 1})
    (tmp_path / "metrics.jsonl").rename(tmp_path / "elsewhere")
    (tmp_path / "metrics.jsonl").symlink_to(tmp_path / "elsewhere")
    metrics.check_in_place()
    metrics.close()


def test_a_folder_is_made_again(tmp_path: Path) -> None:
    names = ("stays", "goes", "is replaced")
    for name in names:
        (tmp_path / name).mkdir()
    folders = Folders([tmp_path / name for name in names])
    assert folders.make_again() == []
    (tmp_path / "goes").rmdir()
    (tmp_path / "is replaced").rmdir()
    (tmp_path / "is replaced").mkdir()
    assert folders.make_again() == [tmp_path / "goes", tmp_path / "is replaced"]
    assert (tmp_path / "goes").is_dir()
    assert folders.make_again() == []
    (tmp_path / "stays").rmdir()
    (tmp_path / "stays").touch()
    with pytest.raises(VlmrlError, match="stays cannot be written"):
        folders.make_again()
    folders.close()
