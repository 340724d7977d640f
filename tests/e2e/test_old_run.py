"""A run that version 34e859f recorded can be resumed, evaluated, exported, replayed and reported.

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
import math
import signal
import zipfile
from pathlib import Path

import pytest
from safetensors.torch import load_file

from support import TESTS
from support.command_line import KILL_AT, Home, steady, steady_rollouts

pytestmark = pytest.mark.slow


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """The old run's folder."""
    run = tmp_path / "old"
    with zipfile.ZipFile(TESTS / "e2e/data/run_of_34e859f.zip") as archive:
        archive.extractall(run)
    return run


def test_it_is_resumed_from_its_checkpoint(home: Home, recorded: Path) -> None:
    """Step 2 comes again and gives the recorded tokens and metrics, up to the rounding of another processor."""
    metrics, rollouts = steady(recorded / "metrics.jsonl"), steady_rollouts(recorded)["step_000002.jsonl"]
    ended = home.vlmrl(f"resume={recorded}")
    assert (ended.code, ended.err) == (0, "")
    assert (recorded / "checkpoints/step_000002").is_dir()
    *before, again = steady(recorded / "metrics.jsonl")
    assert before == metrics[:-1]
    for key, value in metrics[-1].items():
        if key.startswith(("images/encoded", "images/cache")):  # the feature cache starts empty
            continue
        assert math.isclose(again[key], value, rel_tol=1e-4, abs_tol=1e-6), key
    for ours, theirs in zip(steady_rollouts(recorded)["step_000002.jsonl"], rollouts, strict=True):
        for turn, recorded_turn in zip(ours["turns"], theirs["turns"], strict=True):
            assert turn["prompt_token_ids"] == recorded_turn["prompt_token_ids"]
            assert turn["completion_ids"] == recorded_turn["completion_ids"]


def test_its_position_follows_from_its_own_config(home: Home, recorded: Path) -> None:
    """The checkpoint of step 1 has no cursor. Two problems were played per step, so the third comes next. It keeps its
    place even if the run is killed right after config.yaml says another number."""
    groups, third = "orchestrator.groups_per_step=1", "BFGE"
    assert steady_rollouts(recorded)["step_000002.jsonl"][0]["problem_id"] == third
    ended = home.vlmrl("os.mkdir", "partial_000002", f"resume={recorded}", groups, code=("-c", KILL_AT))
    assert ended.code == -signal.SIGKILL
    assert "groups_per_step: 1" in (recorded / "config.yaml").read_text()
    ended = home.vlmrl(f"resume={recorded}", groups)
    assert (ended.code, ended.err) == (0, "")
    assert {record["problem_id"] for record in steady_rollouts(recorded)["step_000002.jsonl"]} == {third}


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
