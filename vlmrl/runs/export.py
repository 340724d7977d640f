"""`mode=export`: write a checkpoint of a run as a Hugging Face folder.

    the checkpoint's weights (trainable ones in float32) ─▶ the model's dtype ─▶ model.safetensors, config.json
        or their moving averages (export.weights=average)
    the folder that the run started from ─▶ tokenizer, chat template, processor, generation_config.json, byte for byte

transformers and vLLM then load what the policy sampled with, LoRA adapters merged. The folder appears complete or not
at all.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from vlmrl.config.export import ExportedWeights
from vlmrl.config.model import Init
from vlmrl.config.run import Mode, RunConfig
from vlmrl.errors import CheckpointError
from vlmrl.models.checkpoints.built_folders import MANIFEST
from vlmrl.models.checkpoints.load import HUB_FILES, load_model, resolve_checkpoint
from vlmrl.models.lora import merged, select_trainable
from vlmrl.record.run_dir import RunDir
from vlmrl.runs.every_rank import seed_process
from vlmrl.runs.tools import texts_of_run
from vlmrl.tasks.loading import load_task
from vlmrl.trainer.checkpoint import Checkpoints
from vlmrl.trainer.training_state import load_weights

WRITTEN_BY_EXPORT = (".safetensors", ".safetensors.index.json", "/config.json", MANIFEST)
"""Files whose names end so are not copied from the folder that the run started from. `generation_config.json` is
copied: it says how to sample from the model and where to stop."""


@dataclasses.dataclass(frozen=True)
class _Weights:
    """Loads a checkpoint's weights into `model`, without an optimizer."""

    model: Any
    averaged: bool
    """Whether to load the moving averages of the weights in their place."""

    def load(self, folder: str) -> None:
        """Load the weights as `vlmrl.types.Trainer.load` does; ignore the rest of the optimizer's state."""
        load_weights(Path(folder), dict(self.model.named_parameters()), averaged=self.averaged)


def export(config: RunConfig) -> None:
    """Export the run's newest checkpoint and print the folder."""
    print(f"exported to {export_checkpoint(config, lambda text: print(f'warning: {text}'))}")


def export_checkpoint(config: RunConfig, warn: Callable[[str], None]) -> Path:
    """Write the newest complete checkpoint of `config.resume`, or that of `config.step`, to `export.folder` and return
    that folder.

    Raises `CheckpointError` where the run has no checkpoint, or every one is damaged.
    """
    run_dir = RunDir(config.output_dir)
    checkpoints = Checkpoints(run_dir.checkpoints, config.trainer.keep_checkpoints)
    seed_process(config)
    # A model that is built here has a tokenizer made of the task's words.
    is_built = config.model.tiny is not None or config.model.init is Init.random
    texts = texts_of_run(config, load_task(config.task, seed=config.seed)) if is_built else ()
    source = resolve_checkpoint(config.model, texts)
    model: Any = load_model(source, config.model)
    select_trainable(model, config.model)
    averaged = config.export.weights is ExportedWeights.average
    found = checkpoints.load_chosen(config.step, _Weights(model, averaged), warn)
    if found is None:
        raise CheckpointError(f"{run_dir.path} has no checkpoint to export")
    if config.model.lora is not None:
        model = _without_adapters(model, load_model(source, config.model))
    folder = Path(config.export.folder or run_dir.export / f"step_{found[0]:06d}")
    with RunDir(run_dir.export).lock(Mode.export.name) if config.export.folder is None else nullcontext():
        _write(model, source, folder, replace=config.export.folder is None)
    return folder


def _write(model: Any, source: Path, folder: Path, *, replace: bool) -> None:
    """Write the model and the files that go with it. `replace` an earlier export."""
    partial = folder.with_name(f".partial_{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model.save_pretrained(partial)
    for path in partial.glob("*.safetensors"):  # safetensors makes them readable for this user only
        path.chmod((partial / "config.json").stat().st_mode)
    for path in source.iterdir():
        is_needed = any(fnmatch(path.name, pattern) for pattern in HUB_FILES)
        if is_needed and not f"/{path.name}".endswith(WRITTEN_BY_EXPORT):
            shutil.copyfile(path, partial / path.name)
    if replace and folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)


def _without_adapters(model: Any, plain: Any) -> Any:
    """Copy the weights of `model`, adapters merged, into `plain`, the same model without adapters; returns `plain`."""
    parameters = dict(plain.named_parameters())
    with torch.no_grad():
        for name, tensor in merged(model):
            parameters[name].copy_(tensor)
    return plain
