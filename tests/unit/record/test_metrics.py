from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import vlmrl
from vlmrl.errors import VlmrlError
from vlmrl.record.metrics import MetricsLog, read_metrics
from vlmrl.record.step_keys import REQUIRED_KEYS, STEP_KEYS, missing_keys


def log_of_steps(path: Path, *steps: int) -> MetricsLog:
    log = MetricsLog(path)
    for step in steps:
        log.write({"step": step, "loss": step / 10})
    return log


def test_a_line_per_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log_of_steps(path, 1, 2).close()
    assert path.read_text() == '{"step":1,"loss":0.1}\n{"step":2,"loss":0.2}\n'


def test_a_line_can_be_read_before_the_log_is_closed(tmp_path: Path) -> None:
    log = log_of_steps(tmp_path / "metrics.jsonl", 1)
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.1}]
    log.close()


def test_numbers_are_finite_or_null(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write({"step": 1, "loss": math.nan, "grad_norm": math.inf, "entropy": np.float32(0.1)})
    log.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step":1,"loss":null,"grad_norm":null,"entropy":0.1}\n'


def test_an_evaluation_joins_the_line_of_its_step_in_either_order(tmp_path: Path) -> None:
    log = log_of_steps(tmp_path / "metrics.jsonl", 1)
    log.write({"step": 1, "eval/reward": 0.5})
    log.write({"step": 2, "eval/reward": 0.75})
    log.write({"step": 2, "loss": 0.2})
    log.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": 0.1, "eval/reward": 0.5},
        {"step": 2, "eval/reward": 0.75, "loss": 0.2},
    ]


def test_a_metric_written_again_replaces_the_first(tmp_path: Path) -> None:
    log = log_of_steps(tmp_path / "metrics.jsonl", 1)
    log.write({"step": 1, "loss": None})
    log.write({"step": 1, "loss": 5.0})
    log.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step":1,"loss":5.0}\n'


def test_resume_drops_later_lines_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log_of_steps(path, 0, 1, 2, 3).close()
    log = MetricsLog(path)
    log.truncate_after(1)
    assert log.last == {"step": 1, "loss": 0.1}
    log.write({"step": 2, "loss": 7.0})
    log.close()
    assert [record["loss"] for record in read_metrics(path)] == [0.0, 0.1, 7.0]


def test_all_lines_can_be_removed(tmp_path: Path) -> None:
    log = log_of_steps(tmp_path / "metrics.jsonl", 3)
    log.truncate_after(2)
    log.write({"step": 1})
    log.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1}]


def test_a_half_written_last_line_is_not_read_and_is_dropped_when_the_log_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step":1}\n{"step":2,"lo')
    assert read_metrics(path) == [{"step": 1}]
    log = MetricsLog(path)
    log.write({"step": 2})
    log.close()
    assert path.read_text() == '{"step":1}\n{"step":2}\n'


DAMAGED = [
    "what?",
    "\0\0\0\0",
    "[2]",
    "2",
    "{}",
    '{"step":"2"}',
    '{"step":null}',
    '{"step":1.5}',
    '{"step":2,"loss":"low"}',
    '{"step":2,"loss":[1]}',
    '{"step":1}',
    '{"step":2}{"step":2}',
    "[" * 2000,
]
"""Complete lines that no run writes after the line of step 1."""


@pytest.mark.parametrize("line", DAMAGED)
def test_a_damaged_line_is_skipped_with_a_warning(line: str, tmp_path: Path) -> None:
    path, said = tmp_path / "metrics.jsonl", list[str]()
    path.write_text(f'{{"step":1}}\n{line}\n{{"step":3}}\n')
    assert read_metrics(path, said.append) == [{"step": 1}, {"step": 3}]
    assert len(said) == 1
    assert said[0].startswith(f"line 2 of {path} is damaged (")


def test_a_log_with_a_damaged_line_goes_on(tmp_path: Path) -> None:
    """The line stays, since it may help to find what damaged it."""
    path, said = tmp_path / "metrics.jsonl", list[str]()
    path.write_text('{"step":1}\nwhat?\n{"step":3}\n{"step":4}\n')
    log = MetricsLog(path, said.append)
    log.truncate_after(3)
    log.write({"step": 4, "loss": 1})
    log.close()
    assert path.read_text() == '{"step":1}\nwhat?\n{"step":3}\n{"step":4,"loss":1}\n'
    assert set(said) == {f"line 2 of {path} is damaged (it is not JSON) and is skipped"}


def test_a_named_pipe_is_no_log(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(VlmrlError, match="it is not a regular file"):
        MetricsLog(tmp_path / "metrics.jsonl")


def test_a_full_disk_raises_and_leaves_no_half_line(tmp_path: Path) -> None:
    """The file-size limit of a process simulates a full disk."""
    path = tmp_path / "metrics.jsonl"
    script = f"""
import resource
from pathlib import Path
from vlmrl.errors import VlmrlError
from vlmrl.record.metrics import MetricsLog
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
log = MetricsLog(Path({str(path)!r}))
log.write({{"step": 1, "key" * 20: 1.0}})
try:
    log.write({{"step": 2, "key" * 20: 1.0}})
except VlmrlError as error:
    print(error)
"""
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(vlmrl.__file__).parents[1], check=True
    )
    assert ran.stdout.startswith(f"{path} cannot be written (No space left on device), so ")
    assert [record["step"] for record in read_metrics(path)] == [1]
    assert path.read_bytes().endswith(b"\n")


def test_required_keys() -> None:
    complete = dict.fromkeys(REQUIRED_KEYS, 1.0)
    assert missing_keys(complete) == []
    assert missing_keys({key: value for key, value in complete.items() if key != "time/sync"}) == ["time/sync"]
    assert missing_keys({"step": 0, "eval/reward": 0.0}) == []
    assert missing_keys({}) == list(REQUIRED_KEYS)


def test_every_key_has_a_unit_and_one_sentence_or_two() -> None:
    for key, known in STEP_KEYS.items():
        assert known.unit, key
        assert known.meaning[0].isupper(), key
        assert known.meaning.endswith("."), key
        assert len(known.meaning) < 130, key
