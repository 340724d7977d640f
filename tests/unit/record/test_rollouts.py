from __future__ import annotations

import logging
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st

import vlmrl
from support import TESTS
from support.rollout_builders import completion, group, image, prompt, rollout, turn
from vlmrl.errors import VlmrlError
from vlmrl.record import rollouts
from vlmrl.record.image_files import write_png
from vlmrl.record.rollout_table import encode
from vlmrl.record.rollouts import MAX_QUEUED_FILES, RolloutRecord, RolloutRecorder, read_rollouts
from vlmrl.record.run_dir import RunDir
from vlmrl.types import DropReason, Image, ImageItem, Message, Prompt, Rollout, StopReason, TokenMetrics, Turn


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    made = RunDir(tmp_path / "run")
    made.create()
    return made


def written(run_dir: RunDir, *rollouts: Rollout) -> list[RolloutRecord]:
    recorder = RolloutRecorder(run_dir)
    recorder.write(1, {"train": rollouts})
    recorder.close()
    return list(read_rollouts(run_dir.rollouts_file("step", 1)))


def assert_exact(record: RolloutRecord, made: Rollout) -> None:
    assert len(record["turns"]) == len(made.turns)
    for stored, original in zip(record["turns"], made.turns, strict=True):
        assert stored["prompt_token_ids"] == original.prompt.token_ids.tolist()
        assert stored["placeholders"] == [(p.offset, p.length, p.hash, p.gaps) for p in original.prompt.placeholders]
        assert stored["completion_ids"] == original.completion.token_ids.tolist()
        assert np.array(stored["logprobs"], np.float32).tobytes() == original.completion.logprobs.tobytes()
        assert stored["versions"] == original.completion.versions.tolist()
        assert (stored["branch"], stored["text"]) == (original.branch, original.text)
        assert (stored["reward"], stored["advantage"]) == (original.reward, original.advantage)


def test_every_field_comes_back(run_dir: RunDir) -> None:
    made = rollout(3, dropped=DropReason.STALE)
    made.rewards, made.task, made.reference = {"math": 1.0, "format": None}, "colors", ["A", 1]
    made.filtered = (DropReason.REPETITION, DropReason.ZERO_ADVANTAGE)
    (record,) = written(run_dir, made)
    assert_exact(record, made)
    assert {key: value for key, value in record.items() if key != "turns"} == {
        "rollout_id": "train/000001/00/03",
        "problem_id": "red-green",
        "step": 1,
        "split": "train",
        "task": "colors",
        "index": 3,
        "reward": 0.75,
        "rewards": {"math": 1.0, "format": None},
        "reference": '["A",1]',
        "metrics": {"share_correct": 0.5},
        "stop_reason": "terminated",
        "filtered": ["repetition", "zero_advantage"],
        "dropped": "stale",
        "error": None,
        "stdout": None,
        "stderr": None,
        "seconds": 0.25,
        "videos": {},
    }
    assert record["turns"][0]["finish_reason"] == "stop"
    assert (record["turns"][0]["trainer_logprobs"], record["turns"][0]["entropies"]) == (None, None)


def test_the_trainers_metrics_are_recorded_for_trained_turns(run_dir: RunDir) -> None:
    made = rollout()
    found = TokenMetrics(np.array([-0.1, -1e-7, -3], np.float32), np.array([0.1, 0.2, 0.3], np.float32))
    made.turns[1].learned = found
    (record,) = written(run_dir, made)
    first, second = record["turns"]
    assert first["trainer_logprobs"] is first["entropies"] is None
    assert np.array(second["trainer_logprobs"], np.float32).tobytes() == found.trainer_logprobs.tobytes()
    assert np.array(second["entropies"], np.float32).tobytes() == found.entropies.tobytes()


def test_a_later_turn_stores_its_tail_only(run_dir: RunDir) -> None:
    made = rollout()
    written(run_dir, made)
    first, second = pandas.read_parquet(run_dir.rollouts_file("step", 1)).turns[0]
    assert (first["prompt_offset"], second["prompt_offset"]) == (0, 8 + 3)
    assert list(second["prompt_token_ids"]) == made.turns[1].prompt.token_ids[11:].tolist() == [7, 7, 7, 7, 99, 99]
    (place,) = second["placeholders"]
    assert (place["offset"], place["length"], place["hash"], len(place["gaps"])) == (15, 2, image(30).hash, 0)


def with_gaps(made: Rollout) -> Rollout:
    """The same rollout whose placeholders have a gap between their two image tokens."""
    for each in made.turns:
        places = tuple(replace(place, length=3, gaps=((1, 1),)) for place in each.prompt.placeholders)
        each.prompt = replace(each.prompt, placeholders=places)
    return made


def test_gaps_come_back(run_dir: RunDir) -> None:
    made = with_gaps(rollout())
    (record,) = written(run_dir, made)
    assert_exact(record, made)
    assert {place[3] for each in record["turns"] for place in each["placeholders"]} == {((1, 1),)}


def test_a_fork_stores_the_whole_prompt(run_dir: RunDir) -> None:
    made = rollout()
    again = prompt([5, 5, 5], [10, 20, 30])
    made.turns[1] = turn(again, [30], branch=1)
    (record,) = written(run_dir, made)
    assert_exact(record, made)
    assert record["turns"][1]["prompt_offset"] == 0
    (image_part,) = [part for part in record["turns"][1]["messages"][0]["content"] if part["type"] == "image"]
    assert image_part["hash"] == image(30).hash, "the reply's image is the last of the branch"


def test_a_turn_that_does_not_extend_its_branch_is_still_exact(run_dir: RunDir) -> None:
    made = rollout()
    made.turns[1] = turn(prompt([5, 5, 5], [30]), [30])
    (record,) = written(run_dir, made)
    assert_exact(record, made)


def test_messages_name_their_images(run_dir: RunDir) -> None:
    (record,) = written(run_dir, rollout())
    assert record["turns"][0]["messages"] == [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Which?"},
                {"type": "image", "hash": image(10).hash},
                {"type": "image", "hash": image(20).hash},
            ],
        }
    ]
    assert record["turns"][1]["messages"][0]["content"][1] == {"type": "image", "hash": image(30).hash}


def test_an_image_that_never_reached_the_prompt_has_no_hash(run_dir: RunDir) -> None:
    text_only = prompt([1, 2], [])
    lost = Turn(text_only, completion([1]), "A", [Message.of("user", Image(b"no image"))], 0, reward=0.0)
    made = Rollout("id", "problem", 0, [lost], 0.0, {}, StopReason.CONTRACT)
    (record,) = written(run_dir, made)
    (message,) = record["turns"][0]["messages"]
    assert message["content"] == [{"type": "image", "hash": None}]


def test_each_distinct_image_is_written_once_and_is_the_picture(run_dir: RunDir) -> None:
    recorder = RolloutRecorder(run_dir)
    recorder.write(1, {"train": group(3).rollouts})
    recorder.flush()
    assert sorted(path.stem for path in run_dir.images.iterdir()) == sorted(image(s).hash for s in (10, 20, 30))
    with PIL.Image.open(run_dir.image(image(20).hash)) as picture:
        assert np.array_equal(np.asarray(picture), image(20).pixels)
    before = run_dir.image(image(20).hash).stat().st_mtime_ns
    recorder.write(2, {"train": group(3).rollouts})
    recorder.close()
    resumed = RolloutRecorder(run_dir)
    resumed.write(3, {"train": group(3).rollouts})
    resumed.close()
    assert run_dir.image(image(20).hash).stat().st_mtime_ns == before


def test_a_rollout_without_turns_keeps_its_fault(run_dir: RunDir) -> None:
    error = "cannot open 'sch\udcf6n.png'"  # how Python represents a file name that is not UTF-8
    made = Rollout("id", "problem", 0, [], 0.0, {}, StopReason.IMAGE_ERROR, error, DropReason.FAULT)
    (record,) = written(run_dir, made)
    assert (record["stop_reason"], record["dropped"], record["turns"]) == ("image_error", "fault", [])
    assert record["error"] == "cannot open 'sch\\udcf6n.png'"


def test_an_engine_may_return_columns_of_its_batch(run_dir: RunDir) -> None:
    made = rollout()
    batch = np.zeros((3, 2), np.float32)
    object.__setattr__(made.turns[0].completion, "logprobs", batch[:, 0])
    (record,) = written(run_dir, made)
    assert record["turns"][0]["logprobs"] == [0.0, 0.0, 0.0]


def test_both_evaluations_share_a_file(run_dir: RunDir) -> None:
    recorder = RolloutRecorder(run_dir)
    recorder.write(10, {"eval_sampled": [rollout(0)], "eval_greedy": [rollout(1)]})
    recorder.close()
    records = read_rollouts(run_dir.rollouts_file("eval", 10))
    assert [(record["split"], record["index"]) for record in records] == [("eval_sampled", 0), ("eval_greedy", 1)]


token_ids = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=5)
one_turn = st.tuples(token_ids, st.lists(st.integers(0, 3), max_size=2), token_ids, st.booleans())


@given(st.lists(one_turn, max_size=5))
def test_any_conversation_comes_back(script: list[tuple[list[int], list[int], list[int], bool]]) -> None:
    turns: list[Turn] = []
    branch = 0
    for text, shades, sampled, fork in script:
        branch += fork and bool(turns)
        made: Prompt = prompt(text, shades, turns[-1] if turns and not fork else None)
        turns.append(Turn(made, completion(sampled, len(turns)), "x", [], branch, reward=0.0))
    made_rollout = Rollout("id", "problem", 0, turns, 0.0, {}, StopReason.MAX_TURNS)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "step.parquet")
        path.write_bytes(encode(1, {"train": [made_rollout]}))
        (record,) = read_rollouts(path)
    assert_exact(record, made_rollout)


class SlowPictures:
    """A disk that writes no picture before `opened` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened = threading.Event()
        self.begun = threading.Semaphore(0)
        write = write_png

        def gated(path: Path, picture: ImageItem | np.ndarray) -> None:
            self.begun.release()
            assert self.opened.wait(60)
            write(path, picture)

        monkeypatch.setattr(rollouts, "write_png", gated)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> SlowPictures:
    return SlowPictures(monkeypatch)


def shown(shade: int) -> Rollout:
    """A rollout that shows one picture."""
    return Rollout(f"id{shade}", "problem", 0, [turn(prompt([1], [shade]), [2])], 0.0, {}, StopReason.TERMINATED)


def blocks(recorder: RolloutRecorder, step: int, slow: SlowPictures) -> None:
    """Record a step, which must wait for the disk, and open the disk."""
    with ThreadPoolExecutor(1) as caller:
        blocked = caller.submit(recorder.write, step, {"train": [shown(step)]})
        assert slow.begun.acquire(timeout=60)
        with pytest.raises(TimeoutError):
            blocked.result(0.1)
        slow.opened.set()
        blocked.result(60)


def assert_recorded(run_dir: RunDir, steps: range) -> None:
    """Every step has its picture and its rollout, and the files were written in the order of the steps."""
    written_at = []
    for step in steps:
        (record,) = read_rollouts(run_dir.rollouts_file("step", step))
        assert record["rollout_id"] == f"id{step}"
        with PIL.Image.open(run_dir.image(image(step).hash)) as picture:
            assert np.array_equal(np.asarray(picture), image(step).pixels)
        written_at.append(run_dir.rollouts_file("step", step).stat().st_mtime_ns)
    assert written_at == sorted(written_at)


def test_slow_pictures_do_not_hold_the_caller_back(
    run_dir: RunDir, slow: SlowPictures, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = RolloutRecorder(run_dir)
    for step in range(MAX_QUEUED_FILES):
        recorder.write(step, {"train": [shown(step)]})  # returns although no picture can be written yet
    assert slow.begun.acquire(timeout=60)
    assert not list(run_dir.rollouts.iterdir()), "a picture comes before the file that names it"
    assert not caplog.records
    slow.opened.set()
    recorder.close()
    assert_recorded(run_dir, range(MAX_QUEUED_FILES))


def test_a_slow_disk_holds_the_caller_back_when_many_files_wait(
    run_dir: RunDir, slow: SlowPictures, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = RolloutRecorder(run_dir)
    for step in range(MAX_QUEUED_FILES):
        recorder.write(step, {"train": [shown(step)]})
    blocks(recorder, MAX_QUEUED_FILES, slow)
    recorder.close()
    assert_recorded(run_dir, range(MAX_QUEUED_FILES + 1))
    assert [record.levelname for record in caplog.records if record.levelno > logging.INFO] == ["WARNING"]
    assert f"the run waits for {run_dir.images}" in caplog.text


@pytest.mark.parametrize("fits", [1, 3])
def test_a_slow_disk_holds_the_caller_back_when_memory_is_full(
    fits: int, run_dir: RunDir, slow: SlowPictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first picture waits whatever its size; then pixels and tensors count."""
    size = image(1).pixels.nbytes + sum(array.nbytes for array in image(1).mm_kwargs.values())
    monkeypatch.setattr(rollouts, "MAX_QUEUED_BYTES", size * fits if fits > 1 else 1)
    recorder = RolloutRecorder(run_dir)
    for step in range(fits):
        recorder.write(step, {"train": [shown(step)]})
    blocks(recorder, fits, slow)
    recorder.close()
    assert_recorded(run_dir, range(fits + 1))


def test_pictures_are_compressed_side_by_side(run_dir: RunDir, slow: SlowPictures) -> None:
    recorder = RolloutRecorder(run_dir)
    recorder.write(1, {"train": group(3).rollouts})
    for _ in range(3):  # of three distinct pictures, while none of them can end
        assert slow.begun.acquire(timeout=60)
    slow.opened.set()
    recorder.close()
    assert len(list(run_dir.images.iterdir())) == 3


def test_a_picture_that_cannot_be_written_is_named(run_dir: RunDir) -> None:
    recorder = RolloutRecorder(run_dir)
    run_dir.image(image(20).hash).with_name(f".{image(20).hash}.png.tmp").mkdir()
    recorder.write(1, {"train": group(3).rollouts})
    with pytest.raises(VlmrlError, match=rf"images/{image(20).hash}\.png cannot be written \(Is a directory"):
        recorder.close()
    assert not list(run_dir.rollouts.iterdir())


def test_a_disk_error_is_raised_with_the_path(run_dir: RunDir) -> None:
    recorder = RolloutRecorder(run_dir)
    run_dir.rollouts.rmdir()
    run_dir.rollouts.touch()
    recorder.write(1, {"train": [rollout()]})
    with pytest.raises(VlmrlError, match=r"rollouts/step_000001\.parquet cannot be written \(File exists"):
        recorder.flush()
    run_dir.rollouts.unlink()
    recorder.write(2, {"train": [rollout()]})
    recorder.close()
    assert len(list(read_rollouts(run_dir.rollouts_file("step", 2)))) == 1, "a folder that is gone is made again"


def test_a_full_disk_is_raised_at_a_later_write(tmp_path: Path) -> None:
    """The file-size limit of a process simulates a full disk; Python ignores the signal and sees EFBIG."""
    script = f"""
import resource, sys
sys.path.insert(0, {str(TESTS)!r})
from support.rollout_builders import group
from vlmrl.errors import VlmrlError
from vlmrl.record.rollouts import RolloutRecorder
from vlmrl.record.run_dir import RunDir
run_dir = RunDir({str(tmp_path / "run")!r})
run_dir.create()
resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, 5_000))
recorder = RolloutRecorder(run_dir)
try:
    for step in range(1, 1000):
        recorder.write(step, {{"train": group(100).rollouts}})
except VlmrlError as error:
    print(step, error)
"""
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(vlmrl.__file__).parents[1], check=True
    )
    step, message = ran.stdout.split(" ", 1)
    assert 1 < int(step) <= 1 + MAX_QUEUED_FILES
    assert "step_000001.parquet cannot be written (File too large)" in message
    assert not (tmp_path / "run/rollouts/step_000001.parquet").exists()


def test_what_is_recorded_so_far(run_dir: RunDir, slow: SlowPictures) -> None:
    """The function waits for the files before it, and not for those after it."""
    recorder = RolloutRecorder(run_dir)
    recorder.write(1, {"train": [shown(1)]})
    wait_for_it = recorder.so_far()
    assert slow.begun.acquire(timeout=60)
    with ThreadPoolExecutor(1) as other:
        waiting = other.submit(wait_for_it)
        with pytest.raises(TimeoutError):
            waiting.result(0.1)
        slow.opened.set()
        waiting.result(60)
        slow.opened.clear()
        recorder.write(2, {"train": [shown(2)]})
        wait_for_it()
        assert not run_dir.rollouts_file("step", 2).exists()
    slow.opened.set()
    recorder.close()
    assert_recorded(run_dir, range(1, 3))


def test_a_file_that_cannot_be_written_is_reported_once(run_dir: RunDir) -> None:
    run_dir.rollouts_file("step", 1).mkdir()
    recorder = RolloutRecorder(run_dir)
    recorder.write(1, {"train": [shown(1)]})
    for _ in range(2):
        with pytest.raises(VlmrlError, match=r"step_000001\.parquet cannot be written"):
            recorder.so_far()()
    recorder.close()


def test_a_killed_run_leaves_whole_files_only(tmp_path: Path) -> None:
    script = f"""
import sys
sys.path.insert(0, {str(TESTS)!r})
from support.rollout_builders import group
from vlmrl.record.rollouts import RolloutRecorder
from vlmrl.record.run_dir import RunDir
run_dir = RunDir({str(tmp_path / "run")!r})
run_dir.create()
recorder = RolloutRecorder(run_dir)
rollouts = group(200).rollouts
for step in range(1, 10_000):
    recorder.write(step, {{"train": rollouts}})
    print(step, flush=True)
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=Path(vlmrl.__file__).parents[1]
    ) as process:
        assert process.stdout is not None
        while process.stdout.readline() != f"{MAX_QUEUED_FILES + 8}\n":
            assert process.poll() is None
        process.kill()
    files = sorted((tmp_path / "run/rollouts").glob("step_*.parquet"))
    assert len(files) >= 8
    assert [len(list(read_rollouts(path))) for path in files] == [200] * len(files)


def test_a_damaged_file_is_named(run_dir: RunDir) -> None:
    path = run_dir.rollouts_file("step", 1)
    path.write_text("{}}\n")
    with pytest.raises(VlmrlError, match=r"step_000001\.parquet cannot be read \(.*\), so the file was edited"):
        list(read_rollouts(path))
