"""What the checkpoint decides of a configuration before config.yaml is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from vlmrl.config.monitor import WandbMode
from vlmrl.config.run import RunConfig
from vlmrl.config.trainer import Packing
from vlmrl.preflight.settle import settle


def test_layers_of_softmax_attention_change_nothing(run_config: Callable[..., RunConfig]) -> None:
    config = run_config("monitor.wandb.mode=disabled")
    settled, notes = settle(config)
    assert settled == config
    assert notes == []


def test_samples_of_layers_with_a_state_are_trained_one_by_one(
    tmp_path: Path, run_config: Callable[..., RunConfig]
) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"text_config": {"layer_types": ["linear_attention", "full_attention"]}})
    )
    config = run_config("model=qwen3vl", "inference=vllm", f"model.name={tmp_path}", "trainer.compile=false")
    settled, (note,) = settle(config)
    assert config.trainer.packing is Packing.tree
    assert settled.trainer.packing is Packing.none
    assert note.startswith(f"trainer.packing=tree is changed to none: {tmp_path} has layers of linear_attention")
    again, notes = settle(settled)
    assert again == settled
    assert settled.monitor.wandb.mode is not WandbMode.auto
    assert notes == []


def test_layers_are_compiled_on_a_gpu_only(run_config: Callable[..., RunConfig]) -> None:
    """Compiling on a CPU takes five minutes, so only a user who writes `true` gets it there."""
    small = ("model=qwen3vl", "model.init=random", "model.device=cpu", "monitor.wandb.mode=disabled")
    config = run_config(*small)
    assert config.trainer.compile is None
    settled, (note,) = settle(config)
    assert settled.trainer.compile is False
    assert note.startswith("trainer.compile=null compiles no layer here")
    assert settle(run_config(*small, "trainer.compile=true"))[0].trainer.compile is True
    assert settle(run_config(*small, "model.device=cuda"))[0].trainer.compile is True
    assert settle(run_config("monitor.wandb.mode=disabled"))[0].trainer.compile is False
