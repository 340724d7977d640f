"""`trainer`: optimizer, schedule, packing, checkpoints. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class Packing(Enum):
    """How samples share a micro-batch (packing.py)."""

    tree = "tree"
    """Each distinct prefix token once per micro-batch."""
    varlen = "varlen"
    """Samples side by side, nothing shared."""
    none = "none"
    """One sample per forward; the reference."""


class Sharding(Enum):
    """Where the weights of a trainer of several ranks are; a run of one process has nothing to choose."""

    full = "full"
    """Each rank holds a slice of every tensor, of its gradient and of the optimizer's averages (FSDP2)."""
    optimizer = "optimizer"
    """Each rank holds a slice of what learns and of the optimizer's averages (ZeRO-1, arXiv 1910.02054). Through the
    micro-batches of a step it holds the weights that are computed with and the sums of the gradients whole: a weight is
    gathered once a step and a gradient summed over the ranks once, where `full` does both in every micro-batch."""
    none = "none"
    """Each rank holds all of them: for a model that has room, and for inference=embedded, which samples from them."""


class Optimizer(Enum):
    """What changes the weights."""

    adamw = "adamw"
    """Averages in float32."""
    adamw_8bit = "adamw_8bit"
    """Averages in 8 bits, a scale per block (torchao, after arXiv 2110.02861): 2 bytes a parameter instead of 8."""


class Decay(Enum):
    """Learning rate after the warm-up."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class Demonstrations(Enum):
    """What supervised samples answer."""

    random = "random"
    """Random answers in the right format: teaches the format, nothing about the pixels."""
    correct = "correct"
    """The task's true answers. (Not called `true`, which YAML and the command line read as a boolean.)"""


@dataclass
class SFTConfig:
    """Supervised steps: the warm-up before RL (`mode=rl`) or the whole run (`mode=sft`)."""

    steps: int = 0
    """Optimizer steps; 0 skips the warm-up."""
    batch_size: int = 64
    """Conversations per optimizer step."""
    learning_rate: float = 1.5e-3
    """Step size of AdamW, constant over the supervised steps."""
    demonstrations: Demonstrations = Demonstrations.random
    """What the assistant says in them."""
    rl_weight: float = 0.0
    """Weight of supervised samples in RL: each step's loss gets this times the mean negative log-likelihood of
    `rl_batch_size` further demonstrations (PPO-ptx, arXiv 2203.02155, eq. 2). With random answers it keeps the policy
    from being certain of an answer that no reward has confirmed: certainty ends exploration, and what is not tried is
    not learned. The weight falls with the learning rate, since in the end the policy should be certain."""
    rl_batch_size: int = 16
    """Conversations per RL step, where `rl_weight` is above 0."""


@dataclass
class TrainerConfig:
    """The learner."""

    max_steps: int = 400
    """Optimizer steps of RL."""
    seq_len: int = 1024
    """Tokens; a sample longer than this is never made (the rollout stops before)."""
    packing: Packing = Packing.tree
    """How samples share a micro-batch."""
    micro_batch_tokens: int = 16384
    """Positions per forward/backward, counted after packing. A single tree or sample may exceed it alone."""
    sharding: Sharding = Sharding.full
    """What each rank holds, where torchrun or Slurm started several."""
    cpu_offload: bool = False
    """What learns (float32 weights, gradients, the optimizer's averages) is in the host's memory, and AdamW runs there:
    for a model that a GPU has no room for otherwise. Nothing changes where the model is on a CPU."""
    optimizer: Optimizer = Optimizer.adamw
    """AdamW, and how it keeps its averages."""
    compile: bool = False
    """`torch.compile` of each layer: fewer passes over memory, a minute at the start. For a GPU."""
    activation_checkpointing: bool = False
    """Keep of each layer its input alone and compute it again in the backward pass: a third more work, a fraction of
    the memory, so that more tokens fit in a micro-batch."""
    feature_cache_mib: int = 1024
    """Bytes, in MiB, for features of images on the trainer's device; only where the vision tower is frozen."""
    learning_rate: float = 1.5e-3
    """Step size of AdamW, at its highest."""
    lr_warmup_steps: int = 0
    """Optimizer steps over which the learning rate rises linearly from 0."""
    decay: Decay = Decay.linear
    """How it falls from there to `max_steps`."""
    min_lr_ratio: float = 0.1
    """Share of `learning_rate` at which the decay ends."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Shares of the old that AdamW's averages keep at a step, of the mean and of the square."""
    eps: float = 1e-8
    """AdamW's, in the gradient's unit; added to the root of the square."""
    weight_decay: float = 0.0
    """Share of a weight that AdamW takes away at a step, times the learning rate (decoupled)."""
    max_grad_norm: float = 1.0
    """The gradient is scaled down to this L2 norm over all parameters."""
    threads: int = 1
    """torch threads on a CPU. One is safer than two on a shared machine."""
    checkpoint_every: int = 20
    """Optimizer steps between checkpoints; 0: only at the end."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept; older ones are deleted."""
    warmup: SFTConfig = field(default_factory=SFTConfig)
    """Supervised steps."""
