"""The inference engine fits the trainer: weights reach it, it is as fresh as it must be, its context is long enough."""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from vlmrl.config.inference import Batching, EmbeddedConfig, VllmConfig
from vlmrl.config.orchestrator import MAX_STOP
from vlmrl.config.run import RunConfig, group_of, schemas_of
from vlmrl.config.weight_sync import FolderSyncConfig, RunningRequests, ServerSyncConfig
from vlmrl.errors import ConfigError
from vlmrl.preflight.site import Site

LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""Hosts in `inference.urls` that are certainly this one."""


def stop_strings_are_few(config: RunConfig) -> None:
    """The engine looks for every stop string after every token."""
    stop = config.orchestrator.stop
    if len(stop) > MAX_STOP:
        raise ConfigError(
            f"orchestrator.stop has {len(stop)} texts, and each of them is looked for after every token, so sampling "
            f"would slow down: remove all but {MAX_STOP}"
        )


def kinds_are_chosen(config: RunConfig) -> None:
    """`kind` comes from the option of its group and is not typed by hand."""
    for key, node in mixed_nodes(config):
        base = next(each for each in (type(node), *type(node).__bases__) if group_of(each) is not None)
        group, schemas = group_of(base), schemas_of(base)
        if schemas.get(node.kind) is not type(node):
            choice = group if group == key else f"+{group}@{key}"
            raise ConfigError(
                f"{key}.kind={node.kind} does not bring the fields of that kind, so the rest of {key} would not "
                f"fit it: choose the option instead, {choice}={'|'.join(schemas)}"
            )


def mixed_nodes(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted key and value of every group of a mixed kind in a config, at any depth."""
    for field in dataclasses.fields(config):
        key, value = prefix + field.name, getattr(config, field.name)
        entries = {key: value}
        if isinstance(value, dict):
            entries = {f"{key}.{name}": entry for name, entry in value.items()}
        for name, entry in entries.items():
            if dataclasses.is_dataclass(entry):
                if group_of(type(entry)) or any(map(group_of, type(entry).__bases__)):
                    yield name, entry
                yield from mixed_nodes(entry, f"{name}.")


def servers_have_one_place(config: RunConfig) -> None:
    """Servers are started here, run already, or are on tasks of the Slurm job; not two of these."""
    inference = config.inference
    if not isinstance(inference, VllmConfig) or inference.slurm_tasks == 0:
        return
    tasks = f"inference.slurm_tasks={inference.slurm_tasks}"
    if inference.urls or inference.replicas != 1:
        other = "inference.urls" if inference.urls else f"inference.replicas={inference.replicas}"
        raise ConfigError(
            f"{tasks} puts all servers on those tasks, so {other} would have no effect: drop one of the two"
        )
    if config.weight_sync.kind == "cuda_ipc":
        raise ConfigError(
            f"{tasks} gives the servers GPUs of their own, and weight_sync=cuda_ipc works on the trainer's GPU only, "
            "so no policy version would reach them: set weight_sync=nccl or weight_sync=folder"
        )


def weights_reach_engine(config: RunConfig) -> None:
    """The weight sync fits the engine, the device and the hosts of the servers."""
    inference, sync = config.inference.kind, config.weight_sync.kind
    if (inference == "embedded") != (sync == "in_process"):
        remedy = "in_process" if inference == "embedded" else "folder"
        raise ConfigError(
            f"weight_sync={sync} does not work with inference={inference}, so no policy version would reach the "
            f"engine: set weight_sync={remedy}"
        )
    if isinstance(config.inference, VllmConfig) and isinstance(config.weight_sync, FolderSyncConfig):
        _refuse_folder_of_one_host(config.inference, config.weight_sync)
    if sync not in ("nccl", "cuda_ipc"):
        return
    if config.model.device == "cpu":
        raise ConfigError(
            f"weight_sync={sync} sends weights from a GPU, and model.device=cpu keeps the trainer on the CPU, so no "
            "policy version would reach the engine: set model.device=auto, or weight_sync=folder"
        )
    assert isinstance(config.inference, VllmConfig), "kinds_are_chosen runs before"
    for url in config.inference.urls:
        if sync == "cuda_ipc" and urlsplit(url).hostname not in LOOPBACK:
            raise ConfigError(
                f"weight_sync=cuda_ipc works on one host only, so the server {url} could not open the trainer's GPU "
                "memory: set weight_sync=nccl, or http://127.0.0.1:<port> in inference.urls"
            )


def _refuse_folder_of_one_host(inference: VllmConfig, sync: FolderSyncConfig) -> None:
    """Servers on another host cannot read a folder in this host's memory."""
    for url in inference.urls:
        elsewhere = urlsplit(url).hostname not in (*LOOPBACK, socket.gethostname())
        if elsewhere and sync.root.startswith("/dev/shm"):
            raise ConfigError(
                f"weight_sync.root={sync.root} is in this host's memory, so the server {url} would never see the "
                "weights: set weight_sync.root to a folder that both hosts see, or weight_sync=nccl"
            )


def kept_requests_stay_apart(config: RunConfig) -> None:
    """Requests that are sent after a weight sync do not find the keys and values of those that run."""
    sync = config.weight_sync
    if not isinstance(sync, ServerSyncConfig) or sync.running_requests is RunningRequests.recompute:
        return
    assert isinstance(config.inference, VllmConfig), "weights_reach_engine runs before"
    if config.inference.urls:
        raise ConfigError(
            f"weight_sync.running_requests=keep needs servers that the run starts: those of inference.urls="
            f"{config.inference.urls} would also use the older weights' keys and values for new requests. Set "
            "weight_sync.running_requests=recompute, or let the run start its servers"
        )


def requests_can_enter(config: RunConfig, site: Site) -> None:
    """One process samples on a GPU, where requests may enter a batch that runs."""
    if not isinstance(config.inference, EmbeddedConfig) or config.inference.batching is Batching.together:
        return
    obstacle = ""
    if site.ranks > 1:
        obstacle = f"{site.ranks} ranks sample each batch in shares"
    elif config.model.device == "cpu":
        obstacle = "model.device=cpu samples batches whole"
    if obstacle:
        raise ConfigError(
            f"inference.batching=rolling lets requests enter a batch that runs, and {obstacle}, so it would have no "
            "effect: set inference.batching=together"
        )


def embedded_is_on_policy(config: RunConfig) -> None:
    """The embedded engine samples from the trainer's own weights, which are always the newest."""
    if config.inference.kind == "embedded" and config.orchestrator.max_staleness != 0:
        raise ConfigError(
            f"orchestrator.max_staleness={config.orchestrator.max_staleness} lets the engine's weights lag behind the "
            "trainer's, and inference=embedded has no weights but the trainer's: set orchestrator.max_staleness=0, or "
            "inference=vllm"
        )


def supports_are_reported(config: RunConfig) -> None:
    """The engine says from which tokens of a truncated distribution it sampled."""
    own = config.orchestrator
    if not isinstance(config.inference, VllmConfig) or own.top_k:
        return
    for key, value, neutral in (("top_p", own.top_p, 1), ("min_p", own.min_p, 0)):
        if value != neutral:
            raise ConfigError(
                f"orchestrator.{key}={value} keeps any number of tokens, and vLLM reports only a given number of the "
                "most probable ones, so the trainer could not compute the probabilities that were sampled from: set "
                f"orchestrator.top_k=50 as well, or orchestrator.{key}={neutral}, or inference=embedded"
            )


def context_holds_samples(config: RunConfig) -> None:
    """Engine and model can hold the longest sample, and a prompt fits next to a completion."""
    seq_len = config.trainer.seq_len
    if config.inference.max_model_len < seq_len:
        raise ConfigError(
            f"inference.max_model_len={config.inference.max_model_len} is shorter than trainer.seq_len={seq_len}, so "
            f"long rollouts would be cut: raise it or set trainer.seq_len={config.inference.max_model_len}"
        )
    tiny = config.model.tiny
    if tiny is not None and tiny.max_position_embeddings < seq_len:
        raise ConfigError(
            f"trainer.seq_len={seq_len} is longer than model.tiny.max_position_embeddings="
            f"{tiny.max_position_embeddings}, so long samples would have positions that the model lacks: set "
            f"model.tiny.max_position_embeddings={seq_len}, or lower trainer.seq_len"
        )
    if config.orchestrator.max_new_tokens >= seq_len:
        raise ConfigError(
            f"orchestrator.max_new_tokens={config.orchestrator.max_new_tokens} fills all of trainer.seq_len={seq_len}, "
            "so no token is left for the prompt: raise trainer.seq_len or lower orchestrator.max_new_tokens"
        )
