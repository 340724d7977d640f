"""The sampler fits the trainer: weights reach it, it is in step, its context is long enough."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit

from vlmrl.config.inference import VllmConfig
from vlmrl.config.run import SCHEMAS, RunConfig
from vlmrl.config.weight_sync import FolderSyncConfig
from vlmrl.errors import ConfigError
from vlmrl.models.families import family_of


def kinds_are_chosen(config: RunConfig) -> None:
    """`kind` is said by the group's option, not typed by hand."""
    for group in ("inference", "weight_sync"):
        node = getattr(config, group)
        if SCHEMAS[group].get(node.kind) is not type(node):
            raise ConfigError(
                f"{group}.kind={node.kind} requires the fields that go with it, else nobody knows what is meant: "
                f"choose the option instead, {group}={'|'.join(SCHEMAS[group])}"
            )


def experts_are_served(config: RunConfig) -> None:
    """vLLM takes the experts of a mixture from a checkpoint in the hub's layout, which is the transpose of the one that
    the trainer holds and a weight sync sends."""
    family = family_of(config.model.vlm)
    if config.inference.kind == "vllm" and not family.vllm_takes_weights:
        raise ConfigError(
            f"inference=vllm requires a model without mixtures of experts, else the weights that model.vlm.family="
            f"{family.name} publishes do not fit the server's: set inference=embedded, or model=qwen3vl"
        )


def weights_reach_engine(config: RunConfig) -> None:
    """Sampler and weight sync fit each other."""
    inference, sync = config.inference.kind, config.weight_sync.kind
    if (inference == "embedded") != (sync == "in_process"):
        remedy = "in_process" if inference == "embedded" else "folder"
        raise ConfigError(
            f"weight_sync={sync} requires another engine than inference={inference}, else no policy version reaches "
            f"the sampler: set weight_sync={remedy}"
        )
    if isinstance(config.inference, VllmConfig) and isinstance(config.weight_sync, FolderSyncConfig):
        folder_is_shared(config.inference, config.weight_sync)
    if sync not in ("nccl", "cuda_ipc"):
        return
    if config.model.device == "cpu":
        raise ConfigError(
            f"weight_sync={sync} requires the trainer on a GPU, else there is nothing that it could send from: set "
            "model.device=auto, or weight_sync=folder"
        )
    assert isinstance(config.inference, VllmConfig), "kinds_are_chosen comes first"
    for url in config.inference.urls:
        if sync == "cuda_ipc" and urlsplit(url).hostname not in LOOPBACK:
            raise ConfigError(
                f"weight_sync=cuda_ipc requires servers on this host, else {url} cannot open the trainer's memory: set "
                "weight_sync=nccl, or in inference.urls http://127.0.0.1:<port>"
            )


def folder_is_shared(inference: VllmConfig, sync: FolderSyncConfig) -> None:
    """Servers see the folder that weights go through."""
    for url in inference.urls:
        elsewhere = urlsplit(url).hostname not in (*LOOPBACK, socket.gethostname())
        if elsewhere and sync.root.startswith("/dev/shm"):
            raise ConfigError(
                f"weight_sync.root={sync.root} requires servers on this host, else {url} never sees the weights, which "
                "are in this host's memory: set weight_sync.root to a folder that both see, or weight_sync=nccl"
            )


def servers_have_one_place(config: RunConfig) -> None:
    """Servers are started here, run already, or are on tasks of the Slurm job."""
    inference = config.inference
    if not isinstance(inference, VllmConfig) or inference.slurm_tasks == 0:
        return
    tasks = f"inference.slurm_tasks={inference.slurm_tasks}"
    if inference.urls or inference.replicas != 1:
        other = "inference.urls" if inference.urls else f"inference.replicas={inference.replicas}"
        raise ConfigError(
            f"{tasks} requires all servers to be on those tasks, else nobody knows whether {other} is meant too: drop "
            "the one or the other"
        )
    if config.weight_sync.kind == "cuda_ipc":
        raise ConfigError(
            f"{tasks} requires weights that leave the trainer's GPU, else the servers, which have GPUs of their own, "
            "cannot open its memory: set weight_sync=nccl or weight_sync=folder"
        )


LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""Hosts in `inference.urls` that are surely this one."""


def embedded_is_in_step(config: RunConfig) -> None:
    """The embedded engine reads the trainer's weights, in turns with it."""
    if config.inference.kind != "embedded":
        return
    if config.orchestrator.max_staleness != 0:
        raise ConfigError(
            f"orchestrator.max_staleness={config.orchestrator.max_staleness} requires an engine of its own, else "
            "sampler and trainer, which share one set of weights under inference=embedded, cannot be steps apart: "
            "set inference=vllm, or orchestrator.max_staleness=0"
        )


def context_holds_samples(config: RunConfig) -> None:
    """Engine and model can hold what the trainer learns from."""
    seq_len = config.trainer.seq_len
    if config.inference.max_model_len < seq_len:
        raise ConfigError(
            f"inference.max_model_len={config.inference.max_model_len} requires trainer.seq_len at most as long, else "
            f"the engine cuts rollouts that would fit in the trainer's {seq_len} tokens: raise inference.max_model_len "
            "or lower trainer.seq_len"
        )
    tiny = config.model.tiny
    if tiny is not None and tiny.max_position_embeddings < seq_len:
        raise ConfigError(
            f"trainer.seq_len={seq_len} requires model.tiny.max_position_embeddings at least as large, else samples "
            f"outgrow the {tiny.max_position_embeddings} positions that the model is built for: raise it or lower "
            "trainer.seq_len"
        )
    if config.orchestrator.max_new_tokens >= seq_len:
        raise ConfigError(
            f"orchestrator.max_new_tokens={config.orchestrator.max_new_tokens} requires a larger trainer.seq_len than "
            f"{seq_len}, else no token is left for the prompt: raise trainer.seq_len or lower "
            "orchestrator.max_new_tokens"
        )
