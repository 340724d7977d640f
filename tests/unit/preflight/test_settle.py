"""What the checkpoint decides of a configuration before config.yaml is written."""

from __future__ import annotations

from collections.abc import Callable
from unittest.mock import patch

import torch

from vlmrl.config.monitor import WandbMode
from vlmrl.config.run import RunConfig
from vlmrl.preflight.settle import settle


def test_nothing_is_changed_without_need(run_config: Callable[..., RunConfig]) -> None:
    config = run_config("monitor.wandb.mode=disabled")
    settled, notes = settle(config)
    assert settled == config
    assert notes == []


def test_wandb_is_settled_once(run_config: Callable[..., RunConfig]) -> None:
    settled, _ = settle(run_config())
    assert settled.monitor.wandb.mode is not WandbMode.auto
    assert settle(settled) == (settled, [])


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


def test_requests_enter_batches_on_a_gpu_only(run_config: Callable[..., RunConfig]) -> None:
    rolling = ("inference.batching=rolling", "trainer.compile=false", "monitor.wandb.mode=disabled")
    with patch("vlmrl.models.checkpoints.load.resolve_device", return_value=torch.device("cpu")):
        _, (note,) = settle(run_config(*rolling, "model.device=auto"))
    assert note.startswith("inference.batching=rolling has no effect here")
    assert settle(run_config(*rolling, "model.device=cuda"))[1] == []
