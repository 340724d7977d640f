"""Files that are written side by side are those of the safetensors library, and no more waits in memory than may."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from support.checkpoints import Learner
from vlmrl.errors import CheckpointError
from vlmrl.trainer import shard_reader, shard_writer, tensor_files
from vlmrl.trainer.checkpoint_files import stored_tensors
from vlmrl.trainer.tensor_files import TensorFile, write_files
from vlmrl.trainer.training_state import begin_to_save

MANY = 2**40
"""More bytes than the tests have."""


def of_every_kind() -> dict[str, Tensor]:
    return {
        "bytes": torch.arange(37, dtype=torch.uint8),
        "one": torch.tensor(7.5),
        "none": torch.zeros(0, 3),
        "half": torch.randn(5, 3).bfloat16(),
        "float16": torch.randn(3).half(),
        "double": torch.randn(2, 2, dtype=torch.float64),
        "whole": torch.arange(6).reshape(2, 3),
        "turned": torch.randn(7, 5).T,
        "every other": torch.randn(12)[::2],
        "large": torch.randn(61, 67),
    }


@pytest.mark.parametrize("chunk", [8, 1000, 2**24])
def test_a_file_is_that_of_safetensors(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_files, "CHUNK_BYTES", chunk)
    tensors, path = of_every_kind(), tmp_path / "a.safetensors"
    found = write_files([TensorFile(path, dict(tensors), {"format": "pt"})], MANY, lambda: None)
    written = path.read_bytes()
    theirs = safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}, {"format": "pt"})
    mine_length, their_length = (int.from_bytes(each[:8], "little") for each in (written, theirs))
    assert json.loads(written[8 : 8 + mine_length]) == json.loads(theirs[8 : 8 + their_length])
    assert written[8 + mine_length :] == theirs[8 + their_length :]
    assert mine_length % 8 == 0, "so that tensors can be used where they lie in the file"
    assert found == {"a.safetensors": hashlib.sha256(written).hexdigest()}
    loaded = safetensors.torch.load_file(path)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def several(folder: Path, files: int, chunks: int) -> list[TensorFile]:
    """Files of so many chunks each, where a chunk has 8 bytes."""
    return [
        TensorFile(folder / f"{number}.safetensors", {"a": torch.full((chunks,), number)}, {})
        for number in range(files)
    ]


class Gate:
    """A disk that stops: nothing is flushed until `opened` is set. Counts the chunks that are copied meanwhile."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened, self.reached = threading.Event(), threading.Semaphore(0)
        self.copies = 0
        self._counting = threading.Lock()
        copy = tensor_files._copy

        def counted(part: Tensor, pinned: tensor_files._Pinned) -> tensor_files.Chunk:
            with self._counting:
                self.copies += 1
            return copy(part, pinned)

        def flush(descriptor: int) -> None:
            self.reached.release()
            assert self.opened.wait(60)

        monkeypatch.setattr(tensor_files, "CHUNK_BYTES", 8)
        monkeypatch.setattr(tensor_files, "_copy", counted)
        monkeypatch.setattr(os, "fsync", flush)


def in_background(files: list[TensorFile], most_bytes: int, copied: threading.Event) -> Callable[[], dict[str, str]]:
    """Begin to write → a function that waits and returns the hashes."""
    found: dict[str, str] = {}
    thread = threading.Thread(target=lambda: found.update(write_files(files, most_bytes, copied.set)))
    thread.start()

    def finish() -> dict[str, str]:
        thread.join(60)
        return found

    return finish


@pytest.mark.timeout(60)
def test_the_tensors_may_change_before_the_disk_is_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, copied = Gate(monkeypatch), threading.Event()
    files = several(tmp_path, 12, 4)
    tensors = [file.tensors["a"] for file in files]
    finish = in_background(files, MANY, copied)
    assert copied.wait(30)
    assert files == [], "nothing holds the memory of the tensors"
    for tensor in tensors:
        tensor.fill_(-1)
    gate.opened.set()
    found = finish()
    assert found == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in tmp_path.iterdir()}
    assert [int(safetensors.torch.load_file(tmp_path / f"{n}.safetensors")["a"].sum()) for n in range(12)] == [
        4 * n for n in range(12)
    ]


@pytest.mark.timeout(60)
def test_copies_wait_for_the_disk_where_memory_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 8 files at the closed gate, no more is copied than theirs and what may wait."""
    gate, copied = Gate(monkeypatch), threading.Event()
    finish = in_background(several(tmp_path, 12, 4), 3 * 8, copied)
    for _ in range(tensor_files.WRITING_THREADS):
        assert gate.reached.acquire(timeout=30)
    assert not copied.wait(0.2)
    assert gate.copies == tensor_files.WRITING_THREADS * 4 + 3
    gate.opened.set()
    assert len(finish()) == 12
    assert copied.is_set()


@pytest.mark.parametrize(("cores", "most_bytes", "begun"), [(2, MANY, 0), (12, MANY, 8), (2, 5 * 8, 8)])
@pytest.mark.timeout(60)
def test_few_cores_copy_first(
    cores: int, most_bytes: int, begun: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files that are begun before all is copied: none on few cores, unless memory is short."""
    monkeypatch.setattr(tensor_files, "cores", lambda: cores)
    monkeypatch.setattr(tensor_files, "CHUNK_BYTES", 8)
    copy, last = tensor_files._copy, threading.Event()

    def last_waits(part: Tensor, pinned: tensor_files._Pinned) -> tensor_files.Chunk:
        if part.view(torch.int64)[0] == 11:
            assert last.wait(30)
        return copy(part, pinned)

    monkeypatch.setattr(tensor_files, "_copy", last_waits)
    finish = in_background(several(tmp_path, 12, 4), most_bytes, threading.Event())
    while len(list(tmp_path.iterdir())) < begun:
        time.sleep(0.01)
    if not begun:
        time.sleep(0.2)
        assert not list(tmp_path.iterdir())
    last.set()
    assert len(finish()) == 12


@pytest.mark.timeout(60)
@pytest.mark.parametrize("most_bytes", [1, 24, MANY])
@pytest.mark.parametrize("bad", [0, 5, 29])
def test_a_file_that_cannot_be_written_ends_all(
    bad: int, most_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the others wait for memory that only this file would free."""
    monkeypatch.setattr(tensor_files, "CHUNK_BYTES", 8)
    files = several(tmp_path, 30, 50)
    files[bad].path = tmp_path / "absent/a.safetensors"
    with pytest.raises(FileNotFoundError, match="absent"):
        write_files(files, most_bytes, lambda: None)
    assert files == []


# ── as a checkpoint ─────────────────────────────────────────────────────────────────────────────────────────


def trained() -> Learner:
    learner = Learner()
    learner.train_step([])
    return learner


def assert_restored(folder: Path, learner: Learner) -> None:
    """Weights, averages and counters are those of `learner`, bit for bit."""
    other = Learner()
    other.load(str(folder))
    assert other.version == learner.version
    assert all(map(torch.equal, other.weights(), learner.weights()))
    for mine, theirs in zip(other.parameters().values(), learner.parameters().values(), strict=True):
        for average in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(other.optimizer.state[mine][average], learner.optimizer.state[theirs][average])


def test_a_state_in_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_writer, "FILE_BYTES", 32)
    learner = trained()
    learner.save(str(tmp_path)).result()
    # 24 and 8 bytes of weights; then step, mean and square of both, 4 + 24 + 24 and 4 + 8 + 8 bytes; 5056 of a state
    names = [path.name for path in sorted(tmp_path.glob("*.safetensors"))]
    assert names == [f"shard-00001-model-0000{part}-of-00005.safetensors" for part in range(1, 6)]
    recorded = json.loads((tmp_path / "sha256.json").read_text())
    assert recorded == {name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in names}
    assert_restored(tmp_path, learner)


def test_one_that_torch_has_written(tmp_path: Path) -> None:
    """As versions before did: the same names in fewer files."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    learner, ours, theirs = trained(), tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    learner.save(str(ours)).result()
    names = {name: 2 if "/" in name or name.startswith("torch") else 1 for name in stored_tensors(ours)}
    state = {
        name: tensor
        for path in ours.glob("*.safetensors")
        for name, tensor in safetensors.torch.load_file(path).items()
    }
    save(
        state,
        storage_writer=HuggingFaceStorageWriter(str(theirs), fqn_to_index_mapping=names, save_distributed=True),
        no_dist=True,
    )
    (theirs / "state.json").write_bytes((ours / "state.json").read_bytes())
    assert {p.name for p in theirs.iterdir()} == {p.name for p in ours.iterdir()} - {"sha256.json"}
    for path in theirs.glob("*.safetensors"):
        with safetensors.safe_open(path, "pt") as one, safetensors.safe_open(ours / path.name, "pt") as other:
            assert texts(one.metadata()) == texts(other.metadata())
    assert_restored(theirs, learner)


def texts(metadata: dict[str, str]) -> dict[str, Any]:
    """The header's texts, of which one is JSON, in any order."""
    return metadata | {"DCP_SHARDING_INFO": json.loads(metadata["DCP_SHARDING_INFO"])}


@pytest.mark.timeout(60)
def test_a_state_that_is_copied_holds_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the disk still works, tensors that only the checkpoint held are gone: on a GPU that is memory of the next
    step."""
    gate = Gate(monkeypatch)
    monkeypatch.setattr(tensor_files, "CHUNK_BYTES", 2**20)
    memory = np.zeros(1000, np.float32)
    gone = weakref.ref(memory)
    learner = trained()
    weights = {**learner.parameters(), "made for it": torch.from_numpy(memory)}
    saving = begin_to_save(tmp_path, weights, learner.optimizer, learner.learning(), {"version": 1})
    del weights, memory
    assert not saving.done()
    assert gone() is None
    gate.opened.set()
    saving.result()


def test_a_slice_of_the_wrong_place_is_noticed(tmp_path: Path) -> None:
    """The comparison above can fail: a header that says another place for a slice."""
    learner = trained()
    learner.save(str(tmp_path)).result()
    path = tmp_path / "shard-00001-model-00001-of-00002.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors["weight"] = tensors["weight"].flip(0)
    slices = {name: {"saved_offsets": [0] * tensor.dim()} for name, tensor in tensors.items()}
    safetensors.torch.save_file(tensors, path, {"DCP_SHARDING_INFO": json.dumps(slices)})
    with pytest.raises(AssertionError):
        assert_restored(tmp_path, learner)


@pytest.mark.parametrize(
    ("limits", "left"),
    [({}, []), ({"": ("max", "5")}, []), ({"": ("900", "100"), "job/step": ("50", "80")}, [0, 800])],
)
def test_limits_of_a_job(
    limits: dict[str, tuple[str, str]], left: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, groups = tmp_path / "own", tmp_path / "groups"
    (groups / "job/step").mkdir(parents=True)
    own.write_text("4:memory:/elsewhere\n0::/job/step\n")
    for name, (most, used) in limits.items():
        (groups / name / "memory.max").write_text(f"{most}\n")
        (groups / name / "memory.current").write_text(f"{used}\n")
    monkeypatch.setattr(shard_writer, "OWN_CGROUP", own)
    monkeypatch.setattr(shard_writer, "CGROUPS", groups)
    assert shard_writer._left_in_cgroups() == left
    if left:
        assert shard_writer.room_for_copies(2) == 0
    monkeypatch.setattr(shard_writer, "OWN_CGROUP", tmp_path / "absent")
    assert shard_writer._left_in_cgroups() == []


def test_an_error_of_any_file_ends_the_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the file goes away after it was checked."""
    monkeypatch.setattr(shard_writer, "FILE_BYTES", 32)
    learner = trained()
    learner.save(str(tmp_path)).result()
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    opened = safetensors.safe_open

    def gone(path: str, framework: str) -> object:
        if path.endswith(names[3]):
            raise FileNotFoundError(f"{path} is gone")
        return opened(path, framework=framework)

    monkeypatch.setattr(shard_reader, "safe_open", gone)
    with pytest.raises(CheckpointError, match=rf"cannot be read \(.*{names[3]} is gone"):
        Learner().load(str(tmp_path))
