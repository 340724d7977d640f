"""`inference`: the sampler. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from vlmrl.config.model import Dtype


@dataclass
class InferenceConfig:
    """What every engine has."""

    kind: str = MISSING
    """Which engine; said by its schema, chosen with `inference=`."""
    max_model_len: int = 1024
    """Tokens of prompt plus completion."""


@dataclass
class EmbeddedConfig(InferenceConfig):
    """The policy generates in the trainer's own process, from the trainer's own weights; no server, no copy."""

    kind: str = "embedded"
    """The engine in the trainer's own process."""


@dataclass
class VllmConfig(InferenceConfig):
    """vLLM servers, which the run starts, watches and stops, or which run already (`urls`)."""

    kind: str = "vllm"
    """vLLM behind `POST /inference/v1/generate`."""
    dtype: Dtype = MISSING
    """Of weights, activations and pixels; `${model.dtype}`, so that sampler and trainer round alike."""
    replicas: int = 1
    """Servers that the run starts; each holds all weights and takes its share of rollouts. Raise it for more GPUs."""
    tensor_parallel_size: int = 1
    """GPUs that share one copy of the weights; raise it for a model that does not fit on one."""
    data_parallel_size: int = 1
    """Engines behind one server, as mixtures of experts want it. Else use replicas: with several engines an image's
    data is sent more than once, and `weight_sync.verify` sees the first engine only."""
    gpu_memory_utilization: float = 0.5
    """Share of a GPU's memory for weights and KV cache. Half, because on one GPU the trainer needs the other half."""
    kv_cache_gib: int = 1
    """GiB of KV cache on a CPU, where vLLM does not measure what is free; a GPU's follows from the memory share."""
    enforce_eager: bool = False
    """No CUDA graphs, no compilation: starts a minute sooner, decodes about half as fast. On a CPU it is always so."""
    extra_args: dict[str, Any] = field(default_factory=dict)
    """More arguments of `vllm serve`, e.g. `{max_num_seqs: 256, limit_mm_per_prompt: {image: 8}}`. They win over ours;
    one that would make samples and trainer disagree is found at start-up and refused."""
    urls: list[str] = field(default_factory=list)
    """Servers that run already, e.g. `[http://10.0.0.7:8000]`; then none is started, and what a server is started with
    (all fields from `replicas` to `extra_args`) is theirs. Their API key is taken from `VLLM_API_KEY`. They serve this
    run alone: it replaces their weights."""
    slurm_tasks: int = 0
    """Tasks of the Slurm job that serve instead of training, the last ones; one server each, on the task's node, and
    none elsewhere. With a task per GPU and n GPUs per server (`tensor_parallel_size` × `data_parallel_size`), n − 1
    tasks are left without work: give a node that samples one task per server. Under srun it is said on the command
    line, not in a file: tasks part before they read any. On several nodes the servers listen beyond their own host;
    the run's key, which goes over the network as it is, keeps others out."""
    startup_timeout_s: float = 900.0
    """Seconds for a server to come up. A large model from a cold disk, compiled, takes minutes."""
    request_timeout_s: float = 600.0
    """Seconds for one answer, weight updates in between included. Far above any honest answer: it finds what hangs."""
    max_restarts: int = 3
    """Times that a server is started again in one run. More often than this it would die again."""
    max_retries: int = 3
    """Times that one turn is asked again because its server died under it."""

    @property
    def starts_servers(self) -> bool:
        """Whether the run's own process starts them, on its machine."""
        return not self.urls and self.slurm_tasks == 0
