"""mode=faults: what a run left is listed, from faults.jsonl or, of a run older than it, from its rollouts."""

from __future__ import annotations

import json
from pathlib import Path

import orjson
import pytest

from vlmrl.cli.main import main
from vlmrl.record.faults import FaultLog, FaultRecord
from vlmrl.record.run_dir import RunDir
from vlmrl.runs.faults import SHOWN_KINDS, faults_in, kinds_of
from vlmrl.types import StopReason


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    run_dir = RunDir(tmp_path / "a run")
    run_dir.rollouts.mkdir(parents=True)
    run_dir.config.write_text("mode: rl\norchestrator:\n  groups_per_step: 2\n")
    return run_dir


def fault(
    row: int, error: str = "KeyError: 'row {row}' (task.py:3, in step)", reason: str = "task_error"
) -> FaultRecord:
    return {
        "step": row,
        "phase": "rl",
        "rollout_id": f"train/{row:06d}/00/00",
        "problem_id": f"row {row}",
        "split": "train",
        "problem_index": row,
        "stop_reason": reason,
        "error": error.format(row=row),
        "traceback": f"Traceback of {row}\n",
    }


def listed(run_dir: RunDir, capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert main(["mode=faults", f"run={run_dir.path}"]) == 0
    return capsys.readouterr().out.splitlines()


def test_equal_errors_stand_together_and_the_most_frequent_kind_is_first(
    run_dir: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [fault(1, "reward=nan", "bad_reward"), *map(fault, range(2, 5)), fault(5, "reward=nan", "bad_reward")]
    FaultLog(run_dir.faults).write(rows)
    lines = listed(run_dir, capsys)
    assert lines[0] == f"5 faults in {run_dir.path}"
    kinds = [line for line in lines if " × " in line]
    assert kinds == ["3 × task_error (rl 3)", "2 × bad_reward (rl 2)"]
    assert [line for line in lines if line.startswith("  | ")] == ["  | Traceback of 2", "  | Traceback of 1"]
    assert f"  play it again: python -m vlmrl mode=faults run='{run_dir.path}' rollout=train/000002/00/00" in lines
    found = json.loads(run_dir.faults_json.read_bytes())
    assert (found["faults"], found["reasons"]) == (5, {"bad_reward": 2, "task_error": 3})
    assert [[row["problem_index"] for row in kind["rows"]] for kind in found["kinds"]] == [[2, 3, 4], [1, 5]]


def test_many_kinds_are_cut_on_the_screen_and_whole_in_the_file(
    run_dir: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [chr(ord("a") + i // 26) + chr(ord("a") + i % 26) for i in range(SHOWN_KINDS + 3)]
    FaultLog(run_dir.faults).write([fault(row, word) for row, word in enumerate(words)])
    assert f"and 3 more kinds: see {run_dir.faults_json}" in listed(run_dir, capsys)
    assert len(json.loads(run_dir.faults_json.read_bytes())["kinds"]) == len(words)


def test_a_run_without_faults(run_dir: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    assert listed(run_dir, capsys) == [f"no faults in {run_dir.path}"]


def test_a_run_that_is_older_than_the_file_is_read_from_its_rollouts(run_dir: RunDir) -> None:
    """In such a run, step s played the groups from (s - 1) · groups_per_step on."""

    def line(rollout_id: str, split: str, stop_reason: StopReason) -> bytes:
        record = {"rollout_id": rollout_id, "problem_id": "p", "step": 3, "split": split, "index": 0, "reward": 0.0}
        record |= {"metrics": {}, "stop_reason": stop_reason, "dropped": None, "seconds": 0.0, "turns": []}
        return orjson.dumps(
            {**record, "error": "a broken row" if stop_reason.is_fault else None}, option=orjson.OPT_APPEND_NEWLINE
        )

    bad, good = StopReason.IMAGE_ERROR, StopReason.TERMINATED
    step = line("train/000003/00/00", "train", good) + line("train/000003/01/02", "train", bad)
    (run_dir.rollouts / "step_000003.jsonl").write_bytes(step + b'{"ha')
    (run_dir.rollouts / "eval_000003.jsonl").write_bytes(line("eval/000003/05/00", "eval_sampled", bad))
    found = faults_in(run_dir, run_dir.read_config())
    assert [(f["phase"], f["split"], f["problem_index"], f["error"]) for f in found] == [
        ("rl", "train", 5, "a broken row"),
        ("eval", "eval", 5, "a broken row"),
    ]
    assert len(kinds_of(found)) == 1


def test_a_half_written_line_of_a_living_run_is_left_out(run_dir: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    FaultLog(run_dir.faults).write([fault(1)])
    with run_dir.faults.open("ab") as file:
        file.write(b'{"step": 2, "pha')
    assert listed(run_dir, capsys)[0] == f"1 fault in {run_dir.path}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "mode=faults takes run=, and rollout= to play one row again"),
        (["run=no/such/run"], "run={here}/no/such/run holds no"),
        (["run={run}", "seed=1"], "mode=faults takes run=, and rollout="),
        (["run={run}", "rollout=train/000001/00/00", "model=qwen3vl"], "mode=faults takes run=, and rollout="),
    ],
)
def test_what_it_cannot_do_is_refused(
    arguments: list[str], message: str, run_dir: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["mode=faults", *(argument.format(run=run_dir.path) for argument in arguments)])
    assert code == 2
    assert message.format(here=Path.cwd()) in capsys.readouterr().err
