"""mode=export: the newest checkpoint of a run as a Hugging Face folder.

    weights, float32 where they learned ─▶ the model's dtype ─▶ model.safetensors, config.json, generation_config.json
    the folder that the run began with ─▶ tokenizer, chat template, processor: byte for byte

What transformers and vLLM load is what the policy sampled with, adapters merged. The folder appears whole or not at
all.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from vlmrl.config.model import Init
from vlmrl.config.run import RunConfig
from vlmrl.errors import CheckpointError, ConfigError
from vlmrl.models.cache import MANIFEST
from vlmrl.models.checkpoints.load import HUB_FILES, load_model, resolve_checkpoint
from vlmrl.models.learning import choose_what_learns
from vlmrl.models.lora import merged
from vlmrl.record.run_dir import RunDir
from vlmrl.runs.build import seed_process
from vlmrl.tasks.loading import load_task
from vlmrl.trainer.checkpoint import Checkpoints, load_weights

MADE_ANEW = (".safetensors", ".safetensors.index.json", "/config.json", MANIFEST)
"""Ends of names in a checkpoint's folder of what is not copied. `generation_config.json` is: how to sample and where to
stop is the checkpoint's to say."""


@dataclasses.dataclass(frozen=True)
class _Weights:
    """A model that a checkpoint is loaded into."""

    model: Any

    def load(self, folder: str) -> None:
        """See `vlmrl.types.Trainer.load`; the optimizer's state is left where it is."""
        load_weights(Path(folder), dict(self.model.named_parameters()))


def export(config: RunConfig) -> None:
    """Export the run's newest checkpoint and print the folder."""
    print(f"exported to {export_checkpoint(config, lambda text: print(f'warning: {text}'))}")


def export_checkpoint(config: RunConfig, warn: Callable[[str], None]) -> Path:
    """Write the newest whole checkpoint of `config.resume` to `export.folder` → that folder.

    Raises `CheckpointError` where there is none.
    """
    run_dir = RunDir(config.output_dir)
    checkpoints = Checkpoints(run_dir.checkpoints, config.trainer.keep_checkpoints)
    if config.export.folder is not None and Path(config.export.folder).exists():
        raise ConfigError(
            f"export.folder={config.export.folder} is there already, and nothing is written over: remove it, or name "
            "another"
        )
    seed_process(config)
    # The tokenizer of a model that is built here is made of the task's words.
    is_built = config.model.tiny is not None or config.model.init is Init.random
    source = resolve_checkpoint(config.model, load_task(config.task, seed=config.seed).texts() if is_built else ())
    model: Any = load_model(source, config.model)
    choose_what_learns(model, config.model)
    found = checkpoints.load_newest(_Weights(model), warn)
    if found is None:
        raise CheckpointError(f"{run_dir.path} has no checkpoint to export")
    if config.model.lora is not None:
        model = _without_adapters(model, load_model(source, config.model))
    folder = Path(config.export.folder or run_dir.path / "export" / f"step_{found[0]:06d}")
    partial = folder.with_name(f".partial_{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model.save_pretrained(partial)
    for path in partial.glob("*.safetensors"):  # which safetensors keeps from other users
        path.chmod((partial / "config.json").stat().st_mode)
    for path in source.iterdir():
        if any(fnmatch(path.name, pattern) for pattern in HUB_FILES) and not f"/{path.name}".endswith(MADE_ANEW):
            shutil.copyfile(path, partial / path.name)
    if folder.exists():  # of an export before
        shutil.rmtree(folder)
    partial.rename(folder)
    return folder


def _without_adapters(model: Any, plain: Any) -> Any:
    """`plain` with the weights of `model`, adapters merged."""
    parameters = dict(plain.named_parameters())
    with torch.no_grad():
        for name, tensor in merged(model):
            parameters[name].copy_(tensor)
    return plain
