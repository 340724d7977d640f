"""The numbers of mode=bench and what they are shown as, from planted steps."""

from __future__ import annotations

import orjson
import pytest

from support.bench_numbers import GIB, config_of, measured, memory, times
from vlmrl.runs.bench.activity import KINDS, SAMPLING, TASK
from vlmrl.runs.bench.finding import Advice
from vlmrl.runs.bench.measured import StepRecord, Times
from vlmrl.runs.bench.table import as_json, largest, limit_rows, part_rows, verdict_rows


def record(
    ended: float, sampling: float, *, rollout: float = 1.0, train: float = 2.0, opening: float = 0.0
) -> StepRecord:
    """A step that ended at a time, up to which engine and envs were busy for so many seconds; envs while it trained."""
    metrics = {"time/step": rollout + train + 0.75, "time/rollout": rollout, "time/train": train, "time/sync": 0.5}
    awaited = dict.fromkeys(KINDS, 0.0) | {SAMPLING: sampling}
    return StepRecord(metrics, (), 0.125, ended, awaited | {TASK: opening}, awaited)


def test_the_trainer_s_side_adds_up_to_the_wall_clock() -> None:
    steps = [record(14.0, 4.0), record(20.0, 6.0, train=4.0, opening=1.0)]
    found = Times.of(record(10.0, 3.0), steps, is_asynchronous=False)
    assert found.step == 5.0
    assert (found.waiting, found.training, found.syncing, found.preparing, found.recording) == (1, 3, 0.5, 0.25, 0.125)
    assert found.other == pytest.approx(5.0 - 1 - 3 - 0.5 - 0.25 - 0.125)
    assert found.kinds[SAMPLING] == 1.5, "the seconds before the first measured step do not count"
    assert found.kinds[TASK] == 0, "envs that are opened while the trainer works cost an on-policy step nothing"
    assert found.idle == 3.5
    ahead = Times.of(record(10.0, 3.0), steps, is_asynchronous=True)
    assert (ahead.kinds[SAMPLING], ahead.kinds[TASK], ahead.idle) == (1.5, 0.5, 3.0)


def test_the_parts_of_an_on_policy_step_add_up_to_it() -> None:
    found = measured(config_of(), times=times({SAMPLING: 3.0, TASK: 1.5}))
    parts = found.parts()
    assert sum(parts.values()) == pytest.approx(10.0)
    assert parts["everything else"] == pytest.approx(0.5 + 0.1), "of the rollouts, and of the loop"
    assert found.least_step == 3.0 + 1.5 + 4.5
    assert largest(found) == ("training", 4.5)


def test_an_asynchronous_step_is_held_against_the_longer_side() -> None:
    config = config_of("inference=vllm", "model=qwen3vl", "orchestrator.max_staleness=1")
    found = measured(config, times=times({SAMPLING: 9.5}, waiting=5.0))
    assert found.least_step == 9.5
    assert largest(found)[0] == "sampling"
    slow_trainer = measured(config, times=times({SAMPLING: 4.0}, waiting=0.1, training=9.0))
    assert slow_trainer.least_step == 9.0
    assert largest(slow_trainer)[0] == "training"
    assert "the engine waits" in part_rows(slow_trainer)


def test_speeds_beside_their_limits() -> None:
    """131,072 tokens in 5 s of a second that they need at least; 9e14 operations in 4.5 s on two ranks of 8e14 a
    second."""
    found = measured(config_of(), ranks=2)
    assert found.sampling_speed == 131_072 / 5
    assert found.train_share == pytest.approx(9e14 / 4.5 / 2 / 8e14)
    rows = limit_rows(found)
    assert "26,214 tokens/s" in rows["sampling"]
    assert "20.0% of the 131,072" in rows["sampling"]
    assert "100 TFLOP/s a rank, 12.5% of the product" in rows["training"]
    assert "64% fewer than one by one" in rows["packing"]
    assert rows["whole step"].startswith("0.95: rollouts and training, one after the other, as measured")


def test_memory_beside_the_plan() -> None:
    text = limit_rows(measured(config_of()))["memory"]
    assert text == "peak 60 GiB of the GPU of 80 GiB, and 8.0 GiB of the host; the plan says 50 GiB, 10 GiB less"
    smaller = limit_rows(measured(config_of(), memory=memory(peak=45 * GIB)))["memory"]
    assert smaller.endswith("the plan says 50 GiB, 5.0 GiB more")
    within = limit_rows(measured(config_of(), memory=memory(full=25)))["memory"]
    assert within.endswith("the plan says 50 GiB to 65 GiB")
    beyond = limit_rows(measured(config_of(), memory=memory(full=25, peak=70 * GIB)))["memory"]
    assert beyond.endswith("the plan says 50 GiB to 65 GiB, 5.0 GiB less")
    assert "knows no sizes" in limit_rows(measured(config_of(), memory=memory(planned=None)))["memory"]


def test_the_verdict() -> None:
    found = measured(config_of())
    advice = [Advice(3.0, "it takes 30% of a step", ("a=1", "b=2")), Advice(1.0, "it waits", ())]
    assert verdict_rows(found, advice) == {
        "bounded by": "sampling: 50% of a step, at 20.0% of what reading weights and cache allows",
        "1.": "a=1 b=2: it takes 30% of a step",
        "2.": "(no key): it waits",
    }
    slow = measured(config_of(), times=times(training=9.0))
    assert (
        verdict_rows(slow, [])["bounded by"]
        == "training: 90% of a step, at 12.5% of what products reach on this device"
    )
    assert verdict_rows(found, [])["set"].startswith("nothing: no part above 10% of a step")


def test_the_json_is_complete() -> None:
    found = measured(config_of(), least_sampling=None, memory=memory(planned=None, kept_activations=None))
    content = orjson.loads(orjson.dumps(as_json(found, [Advice(3.0, "why", ("a=1",))])))
    assert content["step_s"] == {"median": 10.0, "mean": 10.0, "each": [9.0, 10.0, 11.0]}
    assert content["advice"] == [{"settings": ["a=1"], "finding": "why", "share": 0.3}]
    assert content["bounded_by"] == {"part": "sampling", "share": 0.5}
    assert content["memory"]["planned_bytes"] is None
    assert content["sampling"]["least_s"] is None
    assert "no limit" in limit_rows(found)["sampling"]
