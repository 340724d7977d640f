"""A run that samples with top_k, top_p and min_p learns from what it sampled, and a replay gives the same bits."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from support.command_line import SHORT, Home
from vlmrl.record.metrics import read_metrics
from vlmrl.record.rollouts import read_rollouts

pytestmark = pytest.mark.slow

TRUNCATED = ("orchestrator.top_k=5", "orchestrator.top_p=0.9", "orchestrator.min_p=0.05")


def test_what_is_learned_is_what_was_sampled(home: Home) -> None:
    options = ("reference=initial", "algorithm.kl.loss=0.01", "monitor.vision_gap_every=1", "trainer.max_steps=2")
    run = home.made("truncated", (*SHORT, *TRUNCATED, *options))
    lines = [line for line in read_metrics(run / "metrics.jsonl") if line["step"] > 0]
    assert len(lines) == 2
    for line in lines:
        assert line["mismatch_kl/mean"] <= 1e-8
        assert 1 < line["support/mean"] < 5
        assert 0 < line["entropy"] < np.log(5)
    assert (lines[0]["reference_kl/mean"], lines[1]["reference_kl/mean"] > 0) == (0, True)
    records = list(read_rollouts(run / "rollouts/step_000001.parquet"))
    sizes: list[int] = []
    for turn in (turn for record in records for turn in record["turns"]):
        assert turn["support_sizes"] is not None
        assert turn["support_ids"] is not None
        ids = iter(turn["support_ids"])
        for token, size in zip(turn["completion_ids"], turn["support_sizes"], strict=True):
            assert token in list(itertools.islice(ids, size))
        sizes += turn["support_sizes"]
    assert np.mean(sizes) == pytest.approx(lines[0]["support/mean"])
    evaluated = read_rollouts(run / "rollouts/eval_000002.parquet")
    assert {turn["support_sizes"] for record in evaluated for turn in record["turns"]} == {None}
    ended = home.vlmrl("mode=replay", f"run={run}", "step=1")
    assert (ended.code, ended.err) == (0, ""), ended.out
