"""Named evaluation sets, the best checkpoint and mode=eval, from the command line: stopped in the middle, evaluated
again from one of its checkpoints, and compared."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import orjson
import pytest

from support.command_line import SHORT, Ended, Gate, Home, Scenarios, assert_same_run, summary
from vlmrl.record.metrics import read_metrics, step_key
from vlmrl.record.pass_rates import read_pass_rates
from vlmrl.record.rollouts import read_rollouts

pytestmark = pytest.mark.slow

OWN, SEEN = "orchestrator.eval.sets.own", "orchestrator.eval.sets.seen"
STEP_4 = 3 * 2
"""The first problem of the fourth step, during whose rollouts the run is stopped."""


def sets(rows: Path) -> tuple[str, ...]:
    """A set with a task and a reward of its own, fewer problems than it asks for and results by column; and one of
    training problems, every third step."""
    return (
        *(f"+eval_set@{OWN}=default", f"+task@{OWN}.task=dataset", f"{OWN}.task.path={rows}"),
        f"+reward@{OWN}.task.reward.terms.exact=exact",
        *(
            f"{OWN}.problems=50",
            f"{OWN}.samples=3",
            f"{OWN}.by=[subject]",
            f"{OWN}.top_k=20",
            f"{OWN}.max_new_tokens=4",
        ),
        *(f"+eval_set@{SEEN}=default", f"{SEEN}.split=train", f"{SEEN}.problems=4", f"{SEEN}.greedy=false"),
        *(f"{SEEN}.every=3", f"{SEEN}.pass_at=0.25"),
        *("trainer.keep_best=eval/reward", "trainer.checkpoint_every=1", "trainer.keep_checkpoints=1"),
    )


@pytest.fixture(scope="module")
def runs(home: Home) -> Scenarios:
    rows = home.path / "rows.jsonl"
    lines = [
        {
            "question": f"Which letter is number {number}? ",
            "answer": "ABC"[number % 3],
            "subject": ["even", "odd"][number % 2],
        }
        for number in range(9)
    ]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def whole() -> tuple[Path, Ended]:
        run = home.path / "outputs/sets_whole"
        return run, home.vlmrl(*SHORT, *sets(rows), f"hydra.run.dir={run}")

    def stopped() -> tuple[Path, Ended, Ended]:
        run, gate = home.path / "outputs/sets_stopped", Gate(home.path / "gates/sets")
        process = home.start(*SHORT, *gate.arguments(STEP_4), *sets(rows), f"hydra.run.dir={run}")
        gate.wait(lambda: process.poll() is None)
        process.send_signal(signal.SIGINT)
        gate.open()
        out, err = process.communicate()
        return run, Ended(process.returncode, out, err, 0.0), home.vlmrl(f"resume={run}", "task.args.hold=-1")

    return Scenarios(whole=whole, stopped=stopped)


def test_every_set_has_its_metrics_and_rollouts(runs: Scenarios) -> None:
    run, ended = runs["whole"]
    assert ended.code == 0, ended.err
    metrics = {line["step"]: line for line in read_metrics(run / "metrics.jsonl")}
    evaluated = {step: {key.split("/")[1] for key in line if key.startswith("eval/")} for step, line in metrics.items()}
    assert [step for step in metrics if "own" in evaluated[step]] == [0, 2, 4, 6]
    assert [step for step in metrics if "seen" in evaluated[step]] == [0, 3, 6]
    assert "eval/reward" not in metrics[3]
    last = metrics[6]
    assert [key for key in last if key.startswith("eval/") and step_key(key) is None] == []
    assert last["eval/own/problems"] == 9, "the set has all rows, although it asks for more"
    assert {"eval/own/pass@1", "eval/own/pass@2", "eval/own/pass@3", "eval/own/maj@3_se"} <= last.keys()
    assert {"eval/own/reward/exact", "eval/own/reward_greedy"} <= last.keys()
    assert "eval/seen/reward_greedy" not in last
    shares = last["eval/own/by/subject/even"] * 5 / 9 + last["eval/own/by/subject/odd"] * 4 / 9
    assert shares == pytest.approx(last["eval/own/reward"])

    records = list(read_rollouts(run / "rollouts/eval_000006.parquet"))
    counts = {
        split: sum(record["split"] == split for record in records)
        for split in dict.fromkeys(r["split"] for r in records)
    }
    assert counts == {
        "eval_sampled": 8,
        "eval_greedy": 8,
        "eval_own_sampled": 27,
        "eval_own_greedy": 9,
        "eval_seen_sampled": 4,
    }
    own = [record for record in records if record["split"] == "eval_own_sampled"]
    assert own[4]["rollout_id"] == "eval_own/000006/01/01"
    assert max(len(turn["completion_ids"]) for record in own for turn in record["turns"]) <= 4
    assert sum(record["reward"] for record in own) / 27 == pytest.approx(last["eval/own/reward"])
    assert "own " in ended.out


def test_the_best_checkpoint_survives_the_rotation(runs: Scenarios) -> None:
    run, _ = runs["whole"]
    metrics = read_metrics(run / "metrics.jsonl")
    values = {line["step"]: line["eval/reward"] for line in metrics if line.get("eval/reward") is not None}
    best = max(values, key=lambda step: (values[step], -step))
    assert best < 6, "otherwise the newest is the best, and nothing is shown here"
    assert orjson.loads((run / "checkpoints/best.json").read_bytes()) == {
        "step": best,
        "metric": "eval/reward",
        "value": values[best],
        "folder": f"step_{best:06d}",
    }
    assert sorted(path.name for path in (run / "checkpoints").glob("step_*")) == [f"step_{best:06d}", "step_000006"]


def test_a_run_that_was_stopped_in_between_is_the_same(runs: Scenarios) -> None:
    run, first, again = runs["stopped"]
    assert first.code == 1
    assert "stopped after step 3 and saved" in first.err
    assert (again.code, again.err) == (0, "")
    whole, _ = runs["whole"]
    assert_same_run(run, whole)
    for name in ("best.json", "step_000006/loop.json"):
        assert (run / "checkpoints" / name).read_bytes() == (whole / "checkpoints" / name).read_bytes()


def test_a_checkpoint_is_evaluated_with_another_set_and_compared(runs: Scenarios, home: Home) -> None:
    run, _ = runs["whole"]
    far = "orchestrator.eval.sets.far"
    more = (f"+eval_set@{far}=default", f"{far}.problems=4", f"{far}.samples=2", f"{far}.greedy=false")
    best = home.vlmrl("mode=eval", f"resume={run}/checkpoints/best", *more)
    newest = home.vlmrl("mode=eval", f"resume={run}", f"{OWN}.problems=6")
    assert (best.code, newest.code) == (0, 0), best.err + newest.err
    step = orjson.loads((run / "checkpoints/best.json").read_bytes())["step"]
    folder = run / f"eval_step_{step:06d}"
    found = orjson.loads((folder / "evaluation.json").read_bytes())
    assert (found["step"], [each["name"] for each in found["sets"]]) == (step, ["main", "own", "seen", "far"])
    # The same weights and seeds give the same answers as the evaluation in training.
    line = next(line for line in read_metrics(run / "metrics.jsonl") if line["step"] == step)
    own = found["sets"][1]
    assert own["scores"]["reward"]["value"] == line["eval/own/reward"]
    assert own["scores"]["pass@2"] == {
        "value": line["eval/own/pass@2"],
        "se": line["eval/own/pass@2_se"],
        "problems": 9,
    }
    assert set(own["by"]["subject"]) == {"even", "odd"}
    rates = read_pass_rates(folder)
    assert {rates[each["id"]].samples for each in own["problems"]} == {3}
    assert "own" in best.out
    assert "pass@2" in best.out

    compared = home.vlmrl("mode=compare", f"runs=[{folder},{run}/eval]", f"hydra.run.dir={home.path}/outputs/compared")
    assert compared.code == 0, compared.err
    scores = orjson.loads((home.path / "outputs/compared/compare.json").read_bytes())["scores"]
    shared = {(each["set"], each["score"]): each["difference"]["problems"] for each in scores if each["difference"]}
    assert shared["own", "reward"] == 6
    assert "compare.json" in " ".join(path.name for path in (home.path / "outputs/compared").iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resume={run}/checkpoints/best",), "is one checkpoint of a run, which can be evaluated and exported only"),
        (("resume={run}/checkpoints/step_000001", "mode=eval"), "names no checkpoint of .*: choose one of step_"),
    ],
)
def test_what_a_checkpoint_is_not_for(arguments: tuple[str, ...], message: str, runs: Scenarios, home: Home) -> None:
    run, _ = runs["whole"]
    ended = home.vlmrl(*(text.format(run=run) for text in arguments))
    assert ended.code == 2
    assert re.search(message, ended.err), ended.err
    assert summary(run)["exit_reason"] == "finished"


def test_a_set_whose_task_cannot_be_made_is_refused(home: Home) -> None:
    run = home.path / "outputs/sets_refused"
    task = (f"+eval_set@{OWN}=default", f"+task@{OWN}.task=dataset", f"{OWN}.task.path=absent.jsonl")
    ended = home.vlmrl(*SHORT, *task, f"+reward@{OWN}.task.reward.terms.exact=exact", f"hydra.run.dir={run}")
    assert ended.code == 2
    assert OWN in ended.err
    assert "absent.jsonl" in ended.err
