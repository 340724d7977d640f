"""A run with `monitor.max_rollouts_mib` deletes its oldest rollouts, says so, and is resumed as any other."""

from __future__ import annotations

import shutil

import pytest

from support import TESTS
from support.command_line import SHORT, Home, steady, steady_rollouts
from vlmrl.record.disk_bound import read_deleted
from vlmrl.record.run_dir import RunDir

pytestmark = pytest.mark.slow

MIB = 2**20


def test_it_says_what_is_missing_and_goes_on(home: Home) -> None:
    """Its pictures are noise and take about 190 KiB each: two per step, and eight of the evaluations."""
    shutil.copy(TESTS / "support/their_tasks.py", home.path)
    words = (*SHORT, "task=their_tasks:Noise", "trainer.warmup.steps=0", "orchestrator.eval.target=null")
    whole, bounded = home.path / "outputs/whole", home.path / "outputs/bounded"
    for run, bound in ((whole, ()), (bounded, ("monitor.max_rollouts_mib=3",))):
        first = home.vlmrl(*words, f"hydra.run.dir={run}", "trainer.max_steps=4", *bound)
        second = home.vlmrl(f"resume={run}", "trainer.max_steps=6")
        assert [(ended.code, ended.err) for ended in (first, second)] == [(0, "")] * 2

    run_dir = RunDir(bounded)
    deleted = read_deleted(run_dir)
    assert deleted is not None
    assert deleted.step in (2, 3, 4)
    assert deleted.eval is None
    assert run_dir.rollouts_steps("step") == list(range(deleted.step + 1, 7))
    left = [path for folder in (run_dir.rollouts, run_dir.images) for path in folder.iterdir()]
    assert sum(path.stat().st_size for path in left) < 3 * MIB
    kept, all_of_them = steady_rollouts(bounded), steady_rollouts(whole)
    assert kept == {name: all_of_them[name] for name in kept}
    assert steady(bounded / "metrics.jsonl") == steady(whole / "metrics.jsonl")

    said = f"deleted the rollouts of the training steps up to {deleted.step}, because monitor.max_rollouts_mib=3"
    shown = home.vlmrl("mode=report", f"run={bounded}")
    assert (shown.code, shown.err) == (0, "")
    assert said.encode() in (bounded / "report.html").read_bytes()
    refused = home.vlmrl("mode=replay", f"run={bounded}", "step=1")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert refused.err.startswith(f"error: step=1 has no recorded batch any more: the run {said}")
    compared = home.vlmrl("mode=compare", f"runs=[{whole},{bounded}]", f"hydra.run.dir={home.path}/outputs/compared")
    assert (compared.code, compared.err) == (0, "")
    assert f"bounded {said}" in compared.out
