"""Runs whose rollouts are scored by reward terms, with the real command."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from PIL import Image

from support import TESTS
from support.command_line import Ended, Home, Scenarios
from support.judge_server import Server, says
from vlmrl.record.faults import read_faults
from vlmrl.record.metrics import read_metrics
from vlmrl.record.rollouts import RolloutRecord, read_rollouts
from vlmrl.record.step_keys import step_key

pytestmark = pytest.mark.slow

RUN = (
    *("trainer.warmup.steps=30", "trainer.warmup.batch_size=16", "trainer.warmup.learning_rate=5e-3"),
    *("trainer.max_steps=2", "orchestrator.groups_per_step=4", "orchestrator.group_size=4"),
    *("orchestrator.eval.every=2", "orchestrator.eval.problems=6", "orchestrator.max_new_tokens=6"),
    *("monitor.report=false", "monitor.wandb.mode=disabled"),
)
OWN = ("ours", "later", "of_trl", "of_verl", "of_easyr1", "Counting", "sometimes_raises", "abstains")


@pytest.fixture(scope="module")
def runs(home: Home) -> Scenarios:
    shutil.copy(TESTS / "support/their_rewards.py", home.path)
    folder = home.path / "digits"
    folder.mkdir()
    for digit in range(10):
        Image.new("RGB", (40, 20), (25 * digit, 20, 250 - 25 * digit)).save(folder / f"{digit}.png")
    rows = [
        {"question": f"Which digit is number {row}?", "image": f"{row % 10}.png", "answer": str(row % 10), "level": row}
        for row in range(60)
    ]
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    data = ("model=qwen3vl_tiny", "task=dataset", f"task.path={folder}/rows.jsonl", "task.eval_fraction=0.3")

    def own() -> tuple[Path, Ended]:
        sweep = home.path / "outputs/own"
        choices = ",".join(f"[exact,their_rewards{'.py' if name == 'later' else ''}:{name}]" for name in OWN)
        return sweep, home.vlmrl(
            *(*data, *RUN, f"reward={choices}", "reward.terms.exact.weight=0.25"),
            *("--multirun", f"hydra.sweep.dir={sweep}", "hydra.sweep.subdir=${hydra:job.num}"),
        )

    def scored_twice() -> tuple[Path, Ended]:
        run = home.path / "outputs/scored_twice"
        return run, home.vlmrl(
            *("task=color_codeword", "model=qwen3vl_tiny", *RUN, "algorithm.credit=episode", "reward=format"),
            *("reward.terms.format.pattern=A", "reward.terms.format.weight=0.5", "reward.task_weight=2"),
            f"hydra.run.dir={run}",
        )

    def judged() -> tuple[Path, Ended, Server]:
        run = home.path / "outputs/judged"
        judge = Server(says("Half right. Score: 5"))
        try:
            with pytest.MonkeyPatch.context() as variables:
                variables.setenv("MY_KEY", "hunter2hunter2")
                ended = home.vlmrl(
                    *(*data, *RUN, "reward=[number,math,iou,f1,anls,judge]", "reward.terms.judge.weight=0.5"),
                    *(f"reward.terms.judge.url={judge.url}", "reward.terms.judge.model=m"),
                    *("reward.terms.judge.api_key_env=MY_KEY", f"hydra.run.dir={run}"),
                )
        finally:
            judge.shutdown()
            judge.server_close()
        return run, ended, judge

    return Scenarios(own=own, scored_twice=scored_twice, judged=judged)


def trained(run: Path) -> list[RolloutRecord]:
    return [record for path in sorted((run / "rollouts").glob("step_*")) for record in read_rollouts(path)]


def job(runs: Scenarios, name: str) -> Path:
    sweep, ended = runs["own"]
    assert ended.err == ""
    run: Path = sweep / str(OWN.index(name))
    return run


@pytest.mark.parametrize("name", ["later", "of_trl", "of_verl", "of_easyr1"])
def test_a_function_of_ones_own_pays_what_the_built_in_one_pays(runs: Scenarios, name: str) -> None:
    """All of them compare the answer with the reference."""
    records = trained(job(runs, name))
    assert len(records) == 2 * 4 * 4
    assert {record["stop_reason"] for record in records} <= {"terminated", "max_new_tokens"}
    for record in records:
        value = record["rewards"]["exact"]
        assert value is not None
        assert record["rewards"] == {"exact": value, name: value}
        if record["stop_reason"] == "terminated":  # a cut answer is paid 0
            assert record["reward"] == 1.25 * value
        assert record["reference"] in set("0123456789")


def test_values_are_metrics(runs: Scenarios) -> None:
    run = job(runs, "of_verl")
    first, *steps = read_metrics(run / "metrics.jsonl")
    records = trained(run)
    for number, line in enumerate(steps, 1):
        here = [record["rewards"]["of_verl"] for record in records if record["step"] == number]
        assert line["reward/of_verl"] == sum(value or 0.0 for value in here) / len(here)
        assert line["task/of_verl/length"] > 0
        assert "task/of_verl/pred" not in line, "it is a text"
    for key in ("eval/reward/exact", "eval/reward/of_verl_greedy", "eval/task/of_verl/length"):
        assert step_key(key) is not None
        assert key in first


def test_a_function_sees_the_picture_and_may_abstain(runs: Scenarios) -> None:
    records = trained(job(runs, "ours"))
    assert {record["stop_reason"] for record in records} <= {"terminated", "max_new_tokens"}, records[0]["error"]
    assert all(record["rewards"].keys() == {"exact", "ours"} for record in records)


def test_a_term_that_abstains_is_left_out(runs: Scenarios) -> None:
    records = trained(job(runs, "abstains"))
    assert {record["rewards"]["abstains"] for record in records} == {None, 0.5}
    for record in records:
        values = [0.25 * (record["rewards"]["exact"] or 0.0), record["rewards"]["abstains"] or 0.0]
        assert record["reward"] in (0.0, sum(values)), "0.0 where the answer is cut"


def test_a_function_that_raises_costs_its_rollouts(runs: Scenarios, home: Home) -> None:
    run = job(runs, "sometimes_raises")
    failed = [record for record in trained(run) if record["stop_reason"] == "reward_error"]
    assert failed
    assert {record["turns"][-1]["text"].strip() for record in failed} == {"1"}
    assert {record["dropped"] for record in failed} == {"fault"}
    faults = read_faults(run / "faults.jsonl")
    assert (
        "reward.terms.sometimes_raises: their_rewards:sometimes_raises() raised LookupError: no score for rows.jsonl:"
        in (faults[0]["error"])
    )
    again = home.vlmrl("mode=faults", f"run={run}", f"rollout={failed[0]['rollout_id']}")
    assert again.code == 1
    assert "reward/exact: " in again.out
    assert (
        "it happens again: reward_error: reward.terms.sometimes_raises: their_rewards:sometimes_raises()" in again.out
    )


def test_the_reward_of_a_task_and_of_terms_are_added(runs: Scenarios) -> None:
    run, ended = runs["scored_twice"]
    assert ended.err == ""
    records = [record for record in trained(run) if record["stop_reason"] == "terminated"]
    assert records
    for record in records:
        says_a = float("A" in record["turns"][-1]["text"])
        assert record["rewards"] == {"format": says_a}
        assert record["reward"] == pytest.approx(2 * record["metrics"]["exact_match"] + 0.5 * says_a)


def test_built_in_terms_score_a_run(runs: Scenarios) -> None:
    run, ended, judge = runs["judged"]
    assert ended.err == ""
    records = trained(run)
    assert {record["stop_reason"] for record in records} <= {"terminated", "max_new_tokens"}, records[0]["error"]
    for record in records:
        values = record["rewards"]
        assert values["iou"] is None, "a digit is no box"
        assert values["judge"] == 0.5
        is_digit = record["turns"][-1]["text"].strip() == record["reference"]
        assert [values[name] == 1.0 for name in ("f1", "anls")] == [is_digit, is_digit]
        if is_digit:
            assert values["number"] == values["math"] == 1.0
        if record["stop_reason"] == "terminated":
            assert record["reward"] == pytest.approx(
                sum(values[name] or 0.0 for name in ("number", "math", "f1", "anls")) + 0.25
            )
    last = read_metrics(run / "metrics.jsonl")[-1]
    assert last["task/math/timeouts"] == last["task/math/crashes"] == last["task/judge/failures"] == 0.0
    assert judge.keys
    assert set(judge.keys) == {"Bearer hunter2hunter2"}
    assert len(judge.requests[0]["messages"][0]["content"]) == 2, "the image and the text"


def test_the_key_of_a_judge_is_in_no_file(runs: Scenarios) -> None:
    run, ended, _ = runs["judged"]
    assert "hunter2" not in ended.out
    for path in (each for folder in (run, run.parents[1] / "cache") for each in folder.rglob("*") if each.is_file()):
        assert b"hunter2" not in path.read_bytes(), path


def test_no_math_worker_outlives_a_run(runs: Scenarios) -> None:
    runs["judged"]
    # Workers of other tests may be about to end: their runs were killed a moment ago.
    _, alive = psutil.wait_procs([each for each in psutil.process_iter() if is_worker_of_nobody(each)], timeout=30)
    assert alive == []


def is_worker_of_nobody(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return process.ppid() == 1 and any("math_worker.py" in word for word in process.cmdline())
    return False
