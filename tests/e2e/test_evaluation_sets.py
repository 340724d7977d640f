"""Named evaluation sets, the best checkpoint and mode=eval, from the command line: stopped in the middle, evaluated
again from one of its checkpoints, and compared."""

from __future__ import annotations

import json
import re
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from support.command_line import SHORT, Ended, Gate, Home, Scenarios, assert_same_run, summary
from vlmrl.record.metrics import read_metrics
from vlmrl.record.pass_rates import read_pass_rates
from vlmrl.record.rollouts import read_rollouts
from vlmrl.record.step_keys import step_key

pytestmark = pytest.mark.slow

OWN, SEEN, FAR = (f"orchestrator.eval.sets.{name}" for name in ("own", "seen", "far"))
STEP_4 = 3 * 2
"""The first problem of the fourth step, during whose rollouts the run is stopped."""


def sets(rows: Path) -> tuple[str, ...]:
    """A set with a task and a reward of its own, fewer problems than it asks for and results by column; and one of
    training problems, every third step."""
    return (
        *(f"+eval_set@{OWN}=default", f"+task@{OWN}.task=dataset", f"{OWN}.task.path={rows}"),
        f"+reward@{OWN}.task.reward.terms.exact=exact",
        f"+reward@{OWN}.task.reward.terms.by_length=their_tasks:by_length",
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

    return Scenarios(whole=whole, stopped=stopped, without_improvement=lambda: without_improvement(home))


def without_improvement(home: Home) -> tuple[Path, list[Ended]]:
    """A run whose held-out reward is 0.5, in its second life 0.4, and 0.9 in its third."""
    run = home.path / "outputs/without_improvement"
    start = (
        *(*SHORT, "trainer.warmup.steps=0", "trainer.warmup.rl_weight=0", "orchestrator.eval.every=1"),
        *("task=their_tasks:Constant", "task.args.score=0.5", "orchestrator.eval.target=null"),
        *("trainer.keep_best=eval/reward", "trainer.patience=3", "trainer.checkpoint_every=1"),
        *("trainer.keep_checkpoints=1", "trainer.max_steps=1", "task.max_turns=1", "orchestrator.eval.problems=2"),
    )
    return run, [
        home.vlmrl(*start, f"hydra.run.dir={run}"),
        home.vlmrl(f"resume={run}", "trainer.max_steps=2", "task.args.score=0.4"),
        home.vlmrl(f"resume={run}", "trainer.max_steps=20", "task.args.score=0.9"),
    ]


@dataclass(frozen=True)
class Evaluated:
    """Evaluations after training, and a comparison of the first two."""

    best: Path
    newest: Path
    exported: Path
    """Of the newest checkpoint as a Hugging Face folder."""
    out: dict[str, str]
    """What each command printed."""
    scores: list[dict[str, Any]]
    """Of compare.json."""


@pytest.fixture(scope="module")
def evaluated(runs: Scenarios, home: Home) -> Evaluated:
    run, _ = runs["whole"]
    outputs, out = home.path / "outputs", {}

    def made(name: str, *arguments: str) -> None:
        ended = home.vlmrl(*arguments)
        assert (ended.code, ended.err) == (0, ""), arguments
        out[name] = ended.out

    more = (f"+eval_set@{FAR}=default", f"{FAR}.problems=4", f"{FAR}.samples=2", f"{FAR}.greedy=false")
    made("best", "mode=eval", f"resume={run}/checkpoints/best", *more)
    made("newest", "mode=eval", f"resume={run}", f"{OWN}.problems=6")
    made("export", "mode=export", f"resume={run}", f"export.folder={outputs}/hf")
    model = ("model=qwen3vl", f"model.name={outputs}/hf", "model.dtype=float32", "model.device=cpu")
    given = (*SHORT, "experiment=color_codeword_tiny", *model, *sets(home.path / "rows.jsonl"), f"{OWN}.problems=6")
    made("exported", "mode=eval", *given, f"hydra.run.dir={outputs}/hf_evaluated")
    best = run / f"eval_step_{orjson.loads((run / 'checkpoints/best.json').read_bytes())['step']:06d}"
    made("compare", "mode=compare", f"runs=[{best},{run}/eval]", f"hydra.run.dir={outputs}/compared")
    scores = orjson.loads((outputs / "compared/compare.json").read_bytes())["scores"]
    return Evaluated(best, run / "eval", outputs / "hf_evaluated", out, scores)


def rewards_of(folder: Path, split: str) -> dict[str, list[float]]:
    """Problem → rewards of its rollouts, from the record of an evaluation."""
    (file,) = (folder / "rollouts").glob("eval_*.parquet")
    found: dict[str, list[float]] = {}
    for record in read_rollouts(file):
        if record["split"] == split:
            found.setdefault(record["problem_id"], []).append(record["reward"])
    return found


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


def test_a_checkpoint_is_evaluated_with_another_set(runs: Scenarios, evaluated: Evaluated) -> None:
    run, _ = runs["whole"]
    step = orjson.loads((run / "checkpoints/best.json").read_bytes())["step"]
    found = orjson.loads((evaluated.best / "evaluation.json").read_bytes())
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
    rates = read_pass_rates(evaluated.best)
    assert {rates[each["id"]].samples for each in own["problems"]} == {3}
    assert "own" in evaluated.out["best"]
    assert "pass@2" in evaluated.out["best"]


def test_an_exported_checkpoint_is_evaluated_as_the_run_was(evaluated: Evaluated) -> None:
    """Greedy answers are those of the checkpoint, token by token; sampled ones have the seeds of another step."""
    ours, theirs = (
        orjson.loads((folder / "evaluation.json").read_bytes()) for folder in (evaluated.exported, evaluated.newest)
    )
    assert (
        [each["name"] for each in ours["sets"]] == [each["name"] for each in theirs["sets"]] == ["main", "own", "seen"]
    )
    assert ours["step"] == 0
    assert ours["model"].endswith("/hf")
    for mine, other in zip(ours["sets"][:2], theirs["sets"][:2], strict=True):
        assert mine["scores"]["reward_greedy"] == other["scores"]["reward_greedy"]
    greedy = [
        [
            [turn["completion_ids"] for turn in record["turns"]]
            for file in (folder / "rollouts").glob("eval_*.parquet")
            for record in read_rollouts(file)
            if record["split"].endswith("_greedy")
        ]
        for folder in (evaluated.exported, evaluated.newest)
    ]
    assert greedy[0] == greedy[1]
    assert len(greedy[0]) == 8 + 6


def test_every_score_is_that_of_the_recorded_rollouts(evaluated: Evaluated) -> None:
    """Means, and standard errors of the means of problems (arXiv 2411.00640, eq. 4, with equal clusters)."""
    found = orjson.loads((evaluated.exported / "evaluation.json").read_bytes())
    table = [line.split(" problems: ") for line in evaluated.out["exported"].splitlines() if " problems: " in line]
    shown = {words[0].split()[0]: words[1] for words in table}
    for each, split in zip(found["sets"], ("eval", "eval_own", "eval_seen"), strict=True):
        rewards = rewards_of(evaluated.exported, f"{split}_sampled")
        means = np.array([np.mean(values) for values in rewards.values()])
        score = each["scores"]["reward"]
        assert score["problems"] == len(means) == len(each["problems"])
        assert score["value"] == pytest.approx(means.mean())
        assert score["se"] == pytest.approx(means.std(ddof=1) / np.sqrt(len(means)))
        assert {problem["id"]: problem["rewards"] for problem in each["problems"]} == rewards
        assert f"reward {means.mean():.3f}" in shown[each["name"]]


def test_paired_intervals_are_those_of_a_bootstrap_of_the_recorded_rollouts(evaluated: Evaluated) -> None:
    """Problems are drawn with replacement by numpy, each with both of its scores."""
    random, differing = np.random.default_rng(7), 0
    for name, score, split in (
        *(("main", "reward", "eval_sampled"), ("main", "reward_greedy", "eval_greedy")),
        *(("own", "reward", "eval_own_sampled"), ("seen", "reward", "eval_seen_sampled")),
    ):
        before, after = (rewards_of(folder, split) for folder in (evaluated.best, evaluated.newest))
        shared = [problem for problem in before if problem in after]
        change = np.array([np.mean(after[problem]) - np.mean(before[problem]) for problem in shared])
        means = random.choice(change, (20_000, len(change))).mean(axis=1)
        (row,) = (
            each for each in evaluated.scores if (each["set"], each["score"]) == (name, score) and each["difference"]
        )
        found = row["difference"]
        assert found["problems"] == len(shared)
        assert found["value"] == pytest.approx(change.mean())
        # The quantile of a mean of n values is one of few numbers, so both ends may fall on neighbours.
        step = np.min(np.diff(np.unique(means.round(9))), initial=1.0)
        for end, share in (("low", 0.025), ("high", 0.975)):
            assert found[end] == pytest.approx(np.quantile(means, share), abs=1.01 * step)
        differing += bool(change.any())
    assert differing, "otherwise nothing is shown"
    assert {
        each["difference"]["problems"] for each in evaluated.scores if each["set"] == "own" and each["difference"]
    } == {6}


def test_patience_and_the_best_checkpoint_survive_resumes(runs: Scenarios) -> None:
    """The rewards are 0.5 after steps 0 and 1, 0.4 after step 2, and 0.9 from step 3 on, which is the best."""
    run, lives = runs["without_improvement"]
    assert [(ended.code, ended.err) for ended in lives] == [(0, "")] * 3
    metrics = {line["step"]: line["eval/reward"] for line in read_metrics(run / "metrics.jsonl")}
    assert metrics == {0: 0.5, 1: 0.5, 2: 0.4, 3: 0.9, 4: 0.9, 5: 0.9, 6: 0.9}
    assert summary(run)["exit_reason"] == "no_improvement"
    assert orjson.loads((run / "checkpoints/best.json").read_bytes())["step"] == 3
    assert sorted(path.name for path in (run / "checkpoints").glob("step_*")) == ["step_000003", "step_000006"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("resume={run}/checkpoints/best",),
            "one checkpoint of a run, which can only be evaluated, served and exported",
        ),
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
