"""This machine has, or can get, the checkpoint of `model.name`, and a device to train it on."""

from __future__ import annotations

from pathlib import Path

from vlmrl.config.model import Dtype, Init, ModelConfig
from vlmrl.config.run import Mode, RunConfig
from vlmrl.errors import ConfigError
from vlmrl.preflight.site import Site

CPU_LIMIT_BYTES = 2 * 1024**3
"""A model with more bytes of weights on disk is too slow to train on a CPU; `device=auto` refuses it without a GPU."""


def model_runs_here(config: RunConfig, site: Site) -> None:
    """Weights, network and device are there. Takes a second or two, and a few more where the network does not answer;
    loads and downloads nothing."""
    refuse_model(config.model, needs_device=config.mode is not Mode.export)


def refuse_model(config: ModelConfig, *, needs_device: bool = True) -> None:
    """Raise `ConfigError` where this machine has no weights, no network to fetch them, or no device for the model."""
    problems, size = _weights(config)
    too_big_for_cpu = size > CPU_LIMIT_BYTES if size is not None else config.dtype is not Dtype.float32
    device = config.device if needs_device else "cpu"
    if device not in ("cpu", "auto") and not _has_cuda():
        problems.append(f"model.device={device}, and there is no CUDA device that torch can use")
    elif device == "auto" and too_big_for_cpu and not _has_cuda():
        problems.append("a model of this size needs a GPU, and there is no CUDA device that torch can use")
    if problems:
        raise ConfigError(
            f"model.name={config.name} cannot run on this machine: {'; '.join(problems)}. "
            "Run `python -m vlmrl` for the tiny default, which needs neither GPU nor network, "
            "or set model.name=<folder with a Hugging Face checkpoint>"
        )


def _weights(config: ModelConfig) -> tuple[list[str], int | None]:
    """What is wrong with the checkpoint, and the bytes of its weights on disk; None where they are not known."""
    if config.tiny is not None:
        return [], 0
    if config.init is Init.random:
        return [], None
    from vlmrl.models.checkpoints import load

    if not load.is_hub_name(config.name):
        folder = Path(config.name).expanduser()
        problems = load.missing_files(folder, config) or load.wrong_family(folder, config)
        return problems, None if problems else load.weight_bytes(folder)
    cached = load.cached_folder(config.name)
    if cached is not None and not load.missing_files(cached, config):
        return load.wrong_family(cached, config), load.weight_bytes(cached)
    if load.hub_is_reachable():
        return [], None
    where = load.hub_cache()
    return [f"its weights are not in the hub's cache ({where}) and the hub cannot be reached from here"], None


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def embedded_engine_has_a_cache(config: RunConfig, site: Site) -> None:
    """The embedded engine keeps keys and values only, so it cannot continue layers with a state."""
    if config.inference.kind != "embedded" or config.mode is Mode.export:
        return
    from vlmrl.models.checkpoints.layers import stateful_layers

    if layers := stateful_layers(config.model):
        raise ConfigError(
            f"inference=embedded keeps keys and values only, and {config.model.name} has layers of "
            f"{', '.join(layers)}, whose state it would lose between tokens: set inference=vllm"
        )
