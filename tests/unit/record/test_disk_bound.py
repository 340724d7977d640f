"""monitor.max_rollouts_mib: what is deleted, what stays, and what the run says about it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from support.report_runs import noise, one_rollout, one_turn
from vlmrl.record import disk_bound
from vlmrl.record.disk_bound import DeletedRollouts, read_deleted
from vlmrl.record.rollout_rows import image_hashes
from vlmrl.record.rollouts import RolloutRecorder, read_rollouts
from vlmrl.record.run_dir import RunDir
from vlmrl.types import ImageItem, Rollout

SIDE = 64
"""An image of random pixels takes 12 KiB, far more than a file of one rollout."""
SHARED = noise(1000, SIDE, SIDE)


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    made = RunDir(tmp_path / "run")
    made.create()
    return made


@pytest.fixture(autouse=True)
def small_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    """`max_mib` counts KiB in these tests."""
    monkeypatch.setattr(disk_bound, "MIB", 2**10)


def rollout(label: str, step: int, *images: ImageItem) -> Rollout:
    first = one_turn("ab", images[0], step=step, reward=0.0, advantage=0.0)
    turns = [first, *(one_turn("b", image, step=step, reward=0.0, advantage=0.0, before=first) for image in images[1:])]
    return one_rollout(label, step, 0, 0, turns)


def write(run_dir: RunDir, kib: int | None, steps: range, *, resumed_at: int | None = None) -> None:
    """Steps that each show an image of their own and one of all, and an evaluation after each."""
    recorder = RolloutRecorder(run_dir, kib)
    if resumed_at is not None:
        recorder.resume_at(resumed_at)
    for step in steps:
        recorder.write(step, {"train": [rollout("train", step, noise(step, SIDE, SIDE), SHARED)]})
        recorder.write(step, {"eval_sampled": [rollout("eval", step, SHARED)]})
    recorder.close()


def size(run_dir: RunDir) -> int:
    return sum(path.stat().st_size for folder in (run_dir.rollouts, run_dir.images) for path in folder.iterdir())


def test_without_a_bound_everything_stays(run_dir: RunDir) -> None:
    write(run_dir, None, range(1, 9))
    assert run_dir.rollouts_steps("step") == list(range(1, 9))
    assert read_deleted(run_dir) is None
    assert not run_dir.deleted_rollouts.exists()


def test_the_oldest_training_steps_go_and_their_images_with_them(run_dir: RunDir) -> None:
    write(run_dir, 250, range(1, 16))
    kept = run_dir.rollouts_steps("step")
    assert 1 < len(kept) < 15
    assert kept == list(range(kept[0], 16)), "the newest"
    assert run_dir.rollouts_steps("eval") == list(range(1, 16)), "evaluations stay longer"
    wanted = {noise(step, SIDE, SIDE).hash for step in kept} | {SHARED.hash}
    assert {path.stem for path in run_dir.images.iterdir()} == wanted
    assert size(run_dir) <= 250 * 2**10
    assert read_deleted(run_dir) == DeletedRollouts(250, step=kept[0] - 1, eval=None)
    for path in run_dir.rollouts.iterdir():
        hashes = {
            hash for record in read_rollouts(path) for turn in record["turns"] for _, _, hash, _ in turn["placeholders"]
        }
        assert all(run_dir.image(hash).exists() for hash in hashes)
        assert image_hashes(path) == hashes


def test_as_few_as_necessary_go(run_dir: RunDir) -> None:
    """Without the oldest file that is kept, and its image, the rest would be within the bound by far."""
    write(run_dir, 250, range(1, 16))
    oldest = run_dir.rollouts_file("step", run_dir.rollouts_steps("step")[0]).stat().st_size
    assert size(run_dir) + oldest + 12 * 2**10 > 240 * 2**10


def test_evaluations_go_last_and_the_newest_of_each_stays(run_dir: RunDir) -> None:
    write(run_dir, 1, range(1, 6))
    assert (run_dir.rollouts_steps("step"), run_dir.rollouts_steps("eval")) == ([5], [5])
    assert read_deleted(run_dir) == DeletedRollouts(1, step=4, eval=4)
    assert {path.stem for path in run_dir.images.iterdir()} == {noise(5, SIDE, SIDE).hash, SHARED.hash}


def test_a_resumed_run_knows_what_it_has_written(run_dir: RunDir) -> None:
    """It counts the files of before, keeps the images that they show, and deletes those that no file shows."""
    write(run_dir, None, range(1, 9))
    orphan = noise(2000, SIDE, SIDE)
    run_dir.image(orphan.hash).write_bytes(bytes(1000))
    (run_dir.images / "my own picture.png").write_bytes(bytes(1000))
    write(run_dir, 150, range(7, 10), resumed_at=6)
    kept = run_dir.rollouts_steps("step")
    assert kept == list(range(kept[0], 10))
    assert 1 < kept[0] < 9
    wanted = {noise(step, SIDE, SIDE).hash for step in kept} | {SHARED.hash, "my own picture"}
    assert {path.stem for path in run_dir.images.iterdir()} == wanted


def test_steps_that_are_written_again_are_not_called_deleted(run_dir: RunDir) -> None:
    write(run_dir, 1, range(1, 9))
    write(run_dir, None, range(0), resumed_at=8)
    recorder = RolloutRecorder(run_dir, 1)
    recorder.resume_at(5)
    recorder.close()
    assert read_deleted(run_dir) == DeletedRollouts(1, step=5, eval=5)


def test_a_damaged_file_shows_no_image(run_dir: RunDir) -> None:
    write(run_dir, None, range(1, 9))
    run_dir.rollouts_file("step", 8).write_bytes(b"PAR1")
    write(run_dir, 150, range(9, 10), resumed_at=8)
    kept = run_dir.rollouts_steps("step")
    assert 8 in kept
    assert len(list(run_dir.images.iterdir())) == len(kept), "without that of step 8, with the shared one"


def test_nothing_is_deleted_in_a_folder_that_is_a_link(run_dir: RunDir, tmp_path: Path) -> None:
    """Another run may have its images there."""
    run_dir.images.rmdir()
    (tmp_path / "shared").mkdir()
    run_dir.images.symlink_to(tmp_path / "shared")
    write(run_dir, 1, range(1, 5))
    assert run_dir.rollouts_steps("step") == [1, 2, 3, 4]
    assert len(list((tmp_path / "shared").iterdir())) == 5


def test_only_files_of_the_run_go(run_dir: RunDir, tmp_path: Path) -> None:
    """A link in the folder is removed, not what it points to; files of other names stay."""
    outside = tmp_path / "outside.png"
    outside.write_bytes(bytes(np.arange(50, dtype=np.uint8)))
    run_dir.image("ab" * 16).symlink_to(outside)
    notes = run_dir.rollouts / "notes.parquet"
    notes.touch()
    write(run_dir, 1, range(1, 5))
    assert outside.exists()
    assert notes.exists()


def test_the_note_is_written_before_the_files_go(run_dir: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is killed while it deletes files has said so."""
    seen: list[tuple[str, bool]] = []
    unlink = Path.unlink

    def watched(path: Path, missing_ok: bool = False) -> None:
        if path.suffix == ".parquet":
            deleted = read_deleted(run_dir)
            seen.append((path.name, deleted is not None and deleted.covers("step", int(path.stem[5:]))))
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", watched)
    write(run_dir, 150, range(1, 9))
    assert len(seen) >= 2
    assert all(said for _, said in seen)


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"max_rollouts_mib":1,"step":"x","eval":null}', b'{"step":1}'])
def test_a_damaged_note_counts_as_none(run_dir: RunDir, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    run_dir.deleted_rollouts.write_bytes(content)
    assert read_deleted(run_dir) is None
    assert "deleted_rollouts.json" in caplog.text


def test_it_says_what_is_missing() -> None:
    assert DeletedRollouts(64, step=40, eval=10).says() == (
        "deleted the rollouts of the training steps up to 40 and of the evaluations up to step 10, because "
        "monitor.max_rollouts_mib=64"
    )
