"""A run that version 34e859f recorded can be evaluated, exported, replayed, reported and compared. Resuming it is
refused, because its rollouts are JSON lines.

`data/run_of_34e859f.zip` holds two RL steps of the default task on a model of 44,864 parameters, after a warm-up of two
supervised steps; the checkpoint is that of step 1. It was made by `python -m vlmrl` of that commit with:

    model.tiny.hidden_size=16 model.tiny.intermediate_size=16 model.tiny.num_hidden_layers=1
    model.tiny.num_attention_heads=1 model.tiny.num_key_value_heads=1 model.tiny.head_dim=16
    model.tiny.vision_hidden_size=16 model.tiny.vision_intermediate_size=16 model.tiny.vision_num_heads=1
    model.tiny.bpe_merges=0 model.vlm.freeze_vision=true trainer.warmup.steps=2 trainer.warmup.batch_size=2
    trainer.max_steps=2 trainer.checkpoint_every=1 orchestrator.groups_per_step=2 orchestrator.group_size=2
    orchestrator.eval.problems=2 orchestrator.eval.every=2 monitor.report=false monitor.wandb.mode=disabled

The logs and the checkpoint of step 2 were deleted from it, and output_dir and the platform in config.yaml shortened.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
from safetensors.torch import load_file

from support import TESTS
from support.command_line import Home, steady

pytestmark = pytest.mark.slow


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """The old run's folder."""
    run = tmp_path / "old"
    with zipfile.ZipFile(TESTS / "e2e/data/run_of_34e859f.zip") as archive:
        archive.extractall(run)
    return run


def test_it_is_not_resumed(home: Home, recorded: Path) -> None:
    """Its folder stays as it is; the sentence says what is possible instead."""
    before = files(recorded)
    ended = home.vlmrl(f"resume={recorded}", "trainer.max_steps=3")
    assert ended.code == 2
    assert ended.err.startswith(f"error: resume={recorded} is a run of an older version")
    assert f"mode=export resume={recorded}" in ended.err
    assert ended.err.count("\n") == 1
    assert files(recorded) == before


def files(run: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_its_checkpoint_is_evaluated(home: Home, recorded: Path) -> None:
    ended = home.vlmrl(f"resume={recorded}", "mode=eval")
    assert (ended.code, ended.err) == (0, "")
    (line,) = steady(recorded / "eval/metrics.jsonl")
    assert line["step"] == 1


def test_its_checkpoint_is_exported(home: Home, recorded: Path) -> None:
    ended = home.vlmrl(f"resume={recorded}", "mode=export")
    assert (ended.code, ended.err) == (0, "")
    exported = load_file(recorded / "export/step_000001/model.safetensors")
    saved = load_file(recorded / "checkpoints/step_000001/shard-00001-model-00001-of-00002.safetensors")
    assert saved.keys() - exported.keys() <= {"lm_head.weight"}, "tied to the embeddings"
    assert all((exported[name] == saved[name]).all() for name in exported)


@pytest.mark.parametrize(("step", "weights"), [(1, "version 0, made again"), (2, "the checkpoint of version 1")])
def test_its_batches_are_replayed(home: Home, recorded: Path, step: int, weights: str) -> None:
    ended = home.vlmrl("mode=replay", f"run={recorded}", f"step={step}")
    assert (ended.code, ended.err) == (0, "")
    assert weights in ended.out
    lines = json.loads((recorded / f"replay/step_{step:06d}/replay.json").read_bytes())["lines"]
    assert {line["verdict"] for line in lines[:4]} == {"same"}
    assert {line["verdict"] for line in lines[4:]} <= {"same", "rounding"}


def test_it_is_reported(home: Home, recorded: Path) -> None:
    ended = home.vlmrl("mode=report", f"run={recorded}")
    assert (ended.code, ended.err) == (0, "")
    assert (recorded / "report.html").stat().st_size > 10_000
    assert b"train/000001/00/00" in (recorded / "report.html").read_bytes()


def test_it_is_compared_and_shown_next_to_a_new_run(home: Home, recorded: Path, never_stopped: Path) -> None:
    new = home.copy(never_stopped, "next_to_an_old_run")
    ended = home.vlmrl("mode=report", f"runs=[{recorded},{new}]")
    assert (ended.code, ended.err) == (0, "")
    ended = home.vlmrl("mode=compare", f"runs=[{recorded},{new}]", f"hydra.run.dir={recorded.parent}/compared")
    assert (ended.code, ended.err) == (0, "")
