"""This machine has, or can get, the checkpoint of `model.name`, and a device to train it on."""

from __future__ import annotations

import os
from pathlib import Path

from vlmrl.config.inference import VllmConfig
from vlmrl.config.model import Init, ModelConfig
from vlmrl.config.run import Mode, RunConfig
from vlmrl.errors import ConfigError, ModelError
from vlmrl.preflight.auto_model import known_families
from vlmrl.preflight.estimate.sizes import find_sizes
from vlmrl.preflight.places import known_bytes, needs_gpu
from vlmrl.preflight.site import Site


def model_runs_here(config: RunConfig, site: Site) -> None:
    """Weights, network and device are there. Takes a second or two, and a few more where the network does not answer;
    loads and downloads nothing."""
    refuse_model(config.model, needs_device=config.mode is not Mode.export)


def refuse_model(config: ModelConfig, *, needs_device: bool = True) -> None:
    """Raise `ConfigError` where this machine has no weights, no network to fetch them, or no device for the model."""
    problems, size = _weights(config)
    device = config.device if needs_device else "cpu"
    if device not in ("cpu", "auto") and not _has_cuda():
        problems.append(f"model.device={device}, and there is no CUDA device that torch can use")
    elif device == "auto" and needs_gpu(config, size) and not _has_cuda():
        problems.append("a model of this size needs a GPU, and there is no CUDA device that torch can use")
    _refuse(config, problems)


def refuse_family(config: ModelConfig) -> None:
    """Raise `ConfigError` where the checkpoint of `config` is on this machine and is of another family, or damaged."""
    is_of_its_size = config.size is not None and config.name == config.size.name
    if config.tiny is not None or config.init is Init.random or is_of_its_size:
        return
    from vlmrl.models.checkpoints import load

    folder = load.cached_folder(config.name)
    if folder is not None and (folder / "config.json").is_file():
        _refuse(config, _misfits(folder, config))


def _refuse(config: ModelConfig, problems: list[str]) -> None:
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
        return [], known_bytes(config, find_sizes(config))
    from vlmrl.models.checkpoints import load

    if not load.is_hub_name(config.name):
        folder = Path(config.name).expanduser()
        problems = load.missing_files(folder, config) or _misfits(folder, config) or _damaged_weights(folder)
        return problems, None if problems else load.weight_bytes(folder)
    cached = load.cached_folder(config.name)
    if cached is not None and not load.missing_files(cached, config):
        return _misfits(cached, config) or _damaged_weights(cached), load.weight_bytes(cached)
    if load.hub_is_reachable():
        return [], None
    where = load.hub_cache()
    return [f"its weights are not in the hub's cache ({where}) and the hub cannot be reached from here"], None


def _damaged_weights(folder: Path) -> list[str]:
    """Which weight file is truncated or overwritten, by its header; empty where none is."""
    from vlmrl.models.checkpoints import load

    try:
        load.check_weight_headers(folder)
    except ModelError as error:
        return [str(error)]
    return []


def _misfits(folder: Path, config: ModelConfig) -> list[str]:
    """Why the policy cannot compute with the checkpoint of `folder`, which has a config.json."""
    from vlmrl.models.checkpoints import architecture, load, settings

    try:
        wrong = load.wrong_family(folder, config) or load.wrong_image_token(folder, config)
        if wrong:
            return wrong
        content = load.read_json(folder / "config.json")
    except ModelError as error:
        return [str(error)]
    family = content.get("model_type")
    reason = architecture.unfit_config(content)
    if reason is None and family in known_families():
        reason = settings.unreadable(folder, str(family))
    elif reason is None:
        reason = architecture.unfit_class(folder, content, has_images=config.vlm is not None)
    return [] if reason is None else [f"its config.json says {reason}"]


def frequencies_stay(config: RunConfig, site: Site) -> None:
    """No sequence is so long that the rotary embedding of its first tokens changes."""
    if config.model.tiny is not None or config.model.init is Init.random:
        return
    from vlmrl.models.checkpoints import architecture, load

    folder = load.cached_folder(config.model.name)
    if folder is None or not (folder / "config.json").is_file():
        return
    limit = architecture.longest_sequence(load.read_json(folder / "config.json"))
    served = isinstance(config.inference, VllmConfig)
    key = "inference.max_model_len" if served else "trainer.seq_len"
    longest = config.inference.max_model_len if served else config.trainer.seq_len
    if limit is not None and longest > limit:
        raise ConfigError(
            f"{key}={longest} allows sequences of more than {limit} tokens, beyond which the rotary embedding of "
            f"model.name={config.model.name} changes for all tokens of the sequence, so no prefix could be shared: set "
            f"{key}={limit}" + ("" if not served else f" and trainer.seq_len={limit}")
        )


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def cache_is_usable(config: RunConfig, site: Site) -> None:
    """A checkpoint that is built on the spot has a folder to go to."""
    is_built = config.model.tiny is not None or config.model.init is Init.random
    if not is_built or config.mode is Mode.compare:
        return
    from vlmrl.models.checkpoints.built_folders import cache_folder

    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        # A cache that others have filled may be read-only.
        reason = "" if os.access(folder, os.W_OK) or any(folder.iterdir()) else "it may not be written to"
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
        reason = (error.strerror if isinstance(error, OSError) else "") or str(error)
    if reason:
        raise ConfigError(
            f"model.name={config.model.name} is built in the folder VLMRL_CACHE={os.environ.get('VLMRL_CACHE', '')}, "
            f"which cannot be used ({reason}), so there would be no model: set the variable VLMRL_CACHE to a "
            "folder that you may write to"
        )
