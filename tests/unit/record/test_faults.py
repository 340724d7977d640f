"""faults.jsonl: one line per fault, and after a resume the lines of a run that never stopped."""

from __future__ import annotations

from pathlib import Path

import orjson
import pytest

from vlmrl.errors import VlmrlError
from vlmrl.record.faults import FaultLog, FaultPhase, FaultRecord, fault_kind, faults_of, most_frequent, read_faults
from vlmrl.types import Rollout, StopReason


def fault(step: int, phase: FaultPhase = "rl", error: str = "KeyError: 'row'") -> FaultRecord:
    return {
        "step": step,
        "phase": phase,
        "rollout_id": f"train/{step:06d}/00/00",
        "problem_id": "row 9",
        "split": "train",
        "problem_index": 9,
        "stop_reason": "task_error",
        "error": error,
        "traceback": None,
    }


def rollout(rollout_id: str, stop_reason: StopReason, problem_index: int = 7) -> Rollout:
    made = Rollout(rollout_id, "row 7", 0, [], 0.0, {}, stop_reason, problem_index=problem_index)
    made.error, made.traceback = ("no colour", "Traceback …") if stop_reason.is_fault else (None, None)
    return made


def test_only_faults_are_recorded_and_each_names_its_row() -> None:
    rollouts = [
        rollout("eval/000004/00/00", StopReason.TERMINATED),
        rollout("eval-greedy/000004/01/00", StopReason.BAD_REWARD),
        rollout("eval/000004/02/00", StopReason.MAX_TURNS),
    ]
    assert faults_of(4, "eval", rollouts) == [
        {
            "step": 4,
            "phase": "eval",
            "rollout_id": "eval-greedy/000004/01/00",
            "problem_id": "row 7",
            "split": "eval",
            "problem_index": 7,
            "stop_reason": "bad_reward",
            "error": "no colour",
            "traceback": "Traceback …",
        }
    ]


def test_lines_are_appended_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "faults.jsonl"
    log = FaultLog(path)
    log.write([])
    assert not path.exists(), "a run without faults leaves no file"
    log.write([fault(1), fault(1)])
    FaultLog(path).write([fault(2, error="file \udcff.png")])
    log.flush()
    assert read_faults(path) == [fault(1), fault(1), fault(2, error="file \\udcff.png")]


def test_reading_skips_what_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "faults.jsonl"
    good = orjson.dumps(fault(1))
    path.write_bytes(good + b"\n\0\0\0\n[1]\n{}\n" + good + b"\n" + good[:40])
    assert read_faults(path) == [fault(1), fault(1)]
    assert read_faults(tmp_path / "none.jsonl") == []


HISTORY = [fault(1, "supervised"), fault(2, "supervised"), fault(0, "eval"), fault(1), fault(1, "eval"), fault(2)]


@pytest.mark.parametrize(
    ("supervised_steps", "step", "kept"),
    [(2, 2, 6), (2, 1, 5), (2, 0, 3), (2, -1, 2), (1, -1, 1), (0, -1, 0)],
)
def test_a_resumed_run_has_the_lines_of_the_steps_that_it_does_not_repeat(
    tmp_path: Path, supervised_steps: int, step: int, kept: int
) -> None:
    path = tmp_path / "faults.jsonl"
    log = FaultLog(path)
    log.write(HISTORY)
    log.cut_back(supervised_steps=supervised_steps, step=step)
    assert read_faults(path) == HISTORY[:kept]
    assert path.exists() == (kept > 0)
    log.write(HISTORY[kept:])
    assert read_faults(path) == HISTORY


def test_cutting_back_removes_a_half_written_line(tmp_path: Path) -> None:
    path = tmp_path / "faults.jsonl"
    path.write_bytes(orjson.dumps(fault(1)) + b'\n{"step":')
    log = FaultLog(path)
    log.cut_back(supervised_steps=0, step=1)
    log.write([fault(2)])
    assert read_faults(path) == [fault(1), fault(2)]


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    path = tmp_path / "gone" / "faults.jsonl"
    with pytest.raises(VlmrlError, match=r"gone/faults\.jsonl cannot be written"):
        FaultLog(path).write([fault(1)])


def test_faults_that_differ_in_their_row_have_one_reason() -> None:
    errors = [f"step() raised KeyError: {row} (/home/me/task.py:12, in step)" for row in range(3)]
    assert len({fault_kind("task_error", error) for error in errors}) == 1
    assert fault_kind("task_error", errors[0]) != fault_kind("bad_reward", errors[0])
    faults = [("bad_reward", "reward=nan"), *(("task_error", error) for error in errors)]
    assert most_frequent(faults) == ("task_error", errors[0], 3)
