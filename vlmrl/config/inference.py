"""`inference`: the engine that samples."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from omegaconf import MISSING

from vlmrl.config.fields import SMALLEST, Form, Resume, setting
from vlmrl.config.model import Dtype

LONGEST_WAIT_S = 10**7
"""Seconds, four months: the longest wait that a config may ask for."""


@dataclass
class InferenceConfig:
    """What every engine has."""

    kind: str = setting(MISSING, on_resume=Resume.refused)
    """The engine; set by the option that `inference=` chooses."""
    max_model_len: int = setting(1024, on_resume=Resume.noted, low=1, high=2**24, outside="no prompt fits")
    """The most tokens of prompt and completion together."""


class Batching(Enum):
    """When a request of the embedded engine is sampled."""

    together = "together"
    rolling = "rolling"


@dataclass
class EmbeddedConfig(InferenceConfig):
    """The policy generates in the trainer's own process, from the trainer's own weights: no server and no copy."""

    kind: str = setting("embedded", on_resume=Resume.refused)
    """The engine in the trainer's own process."""
    batching: Batching = setting(Batching.together, on_resume=Resume.noted)
    """`together`: a batch starts when every rollout has asked, and answers come when all have ended, so runs repeat bit
    for bit. `rolling`: an answer comes when it has ended, and the next turn enters while the others are sampled. That
    is faster where rollouts have several turns and answers of different lengths, and a run repeats up to rounding only.
    On one GPU; on a CPU requests never enter."""


@dataclass
class VllmConfig(InferenceConfig):
    """vLLM servers, which the run starts, watches and stops, or servers that already run (`urls`)."""

    kind: str = setting("vllm", on_resume=Resume.refused)
    """vLLM behind `POST /inference/v1/generate`."""
    dtype: Dtype = setting(MISSING, on_resume=Resume.noted)
    """Number format of weights, activations and pixels. The default is `${model.dtype}`, so that sampler and trainer
    round alike."""
    replicas: int = setting(1, on_resume=Resume.free, low=1, high=4096, outside="there is no server")
    """Servers that the run starts. Each holds all weights and takes its share of the rollouts. Raise it to use more
    GPUs."""
    tensor_parallel_size: int = setting(1, on_resume=Resume.free, low=1, high=1024, outside="no GPU holds the weights")
    """GPUs that share one copy of the weights. Raise it for a model that does not fit on one."""
    data_parallel_size: int = setting(
        1, on_resume=Resume.free, low=1, high=1024, outside="there is no engine behind a server"
    )
    """Engines behind one server, which mixtures of experts need. Otherwise use `replicas`: with several engines an
    image's data is sent more than once, and `weight_sync.verify` sees the first engine only."""
    gpu_memory_utilization: float = setting(
        0.5, on_resume=Resume.free, low=SMALLEST, high=1, outside="it is not a share of a GPU's memory"
    )
    """Share of a GPU's memory for weights and KV cache. The default is half, because on one GPU the trainer needs the
    other half."""
    kv_cache_gib: int = setting(1, on_resume=Resume.free, low=1, high=2**16, outside="the KV cache holds no token")
    """GiB of KV cache on a CPU, where vLLM does not measure the free memory. On a GPU it follows from
    `gpu_memory_utilization`."""
    enforce_eager: bool = setting(False, on_resume=Resume.free)
    """Use neither CUDA graphs nor compilation: a server starts a minute sooner and decodes about half as fast. On a CPU
    this is always so."""
    extra_args: dict[str, Any] = setting({}, on_resume=Resume.noted, free_form=True)
    """More arguments of `vllm serve`, e.g. `{max_num_seqs: 256, limit_mm_per_prompt: {image: 8}}`. They win over ours.
    An argument that would make samples and trainer disagree is found at start-up and refused."""
    urls: list[str] = setting(
        [],
        on_resume=Resume.free,
        form=Form(
            r"https?://(\[[0-9A-Fa-f:.]+\]|[^\s/:@?#\[\]]+)(:\d{1,5})?(/\S*)?",
            "of the form http://host:port",
            "no server is found",
        ),
    )
    """Servers that already run, e.g. `[http://10.0.0.7:8000]`. Then the run starts none, and the fields from `replicas`
    to `extra_args` have no effect. Their API key comes from the environment variable `VLLM_API_KEY`. They may serve
    this run only, because it replaces their weights."""
    slurm_tasks: int = setting(
        0, on_resume=Resume.free, low=0, high=10**5, outside="it is not a number of tasks (0 is none)"
    )
    """Tasks of the Slurm job that serve instead of training: the last ones of the job, one server each, on the task's
    node. The run starts no other servers then. With a task per GPU and n GPUs per server (`tensor_parallel_size` ×
    `data_parallel_size`), n − 1 tasks have no work, so give a node that samples one task per server. Under srun, set it
    on the command line and not in a file, because tasks take their parts before they read files. On several nodes, the
    servers listen beyond their own host. A key that is new after each restart keeps others out, but it goes over the
    network unencrypted."""
    startup_timeout_s: float = setting(
        900.0, on_resume=Resume.free, low=SMALLEST, high=LONGEST_WAIT_S, outside="no server is up in time"
    )
    """Seconds for a server to come up. A large model from a cold disk, with compilation, takes minutes."""
    request_timeout_s: float = setting(
        300.0, on_resume=Resume.free, low=SMALLEST, high=LONGEST_WAIT_S, outside="no response comes in time"
    )
    """Seconds that a server may go without progress: without a token while it has requests, without a sign of life
    while it has none, without an answer to a call of a weight update. Then it hangs, and is restarted. A slow server
    makes progress, however long one response takes. Raise it if a weight update takes longer."""
    max_restarts: int = setting(
        3, on_resume=Resume.free, low=0, high=10**6, outside="it is not a number of restarts (0 is none)"
    )
    """Times that a server is started again in one run, because it died or hung. A server that dies more often would
    die again."""
    max_retries: int = setting(
        3, on_resume=Resume.free, low=0, high=10**6, outside="it is not a number of retries (0 is none)"
    )
    """Times that a request is repeated because its server died or hung."""

    @property
    def starts_servers(self) -> bool:
        """Whether the run's own process starts the servers, on its machine."""
        return not self.urls and self.slurm_tasks == 0

    @property
    def engines(self) -> int:
        """Engines behind all servers of the run."""
        return (len(self.urls) or self.slurm_tasks or self.replicas) * self.data_parallel_size
