"""`trainer`: optimizer, schedule, packing and checkpoints."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum

from vlmrl.config.fields import METRIC, SMALLEST, Resume, setting


class Packing(Enum):
    """How samples share a micro-batch (`vlmrl.trainer.packing`)."""

    tree = "tree"
    """Each distinct prefix token is computed once per micro-batch."""
    varlen = "varlen"
    """Samples stand side by side and share nothing."""
    none = "none"
    """One sample per forward pass; the reference."""


class Sharding(Enum):
    """Where the weights are when the trainer has several ranks. With one rank it has no effect."""

    full = "full"
    """Each rank holds a slice of every tensor, of its gradient and of the optimizer state (FSDP2)."""
    optimizer = "optimizer"
    """Each rank holds a slice of the trainable weights and of the optimizer state (ZeRO-1, arXiv 1910.02054). During
    the micro-batches of a step it holds the compute weights and the summed gradients whole: weights are gathered and
    gradients summed over the ranks once per step, where `full` does both in every micro-batch."""
    none = "none"
    """Each rank holds all weights, their gradients and the whole optimizer state: for a model that is small beside the
    GPU."""


class Optimizer(Enum):
    """The optimizer and the number format of its state."""

    adamw = "adamw"
    """AdamW with its averages in float32."""
    adamw_8bit = "adamw_8bit"
    """AdamW with its averages in 8 bits and one scale per block (torchao, after arXiv 2110.02861): 2 bytes per
    parameter instead of 8."""


class Decay(Enum):
    """The learning rate after the warm-up."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"
    wsd = "wsd"
    """Warm-up, stable, decay (arXiv 2404.06395): constant, and over the last `decay_share` of the steps down as
    1 − sqrt (arXiv 2405.18392, eq. 1, which ends lower there than a linear decay). A run that is resumed before that
    part can be given more steps, as if they had been meant from the start."""


class Demonstrations(Enum):
    """What the assistant says in supervised samples."""

    random = "random"
    """Random answers in the right format: they teach the format and nothing about the pixels."""
    correct = "correct"
    """The task's true answers. (Not called `true`, which YAML and the command line read as a boolean.)"""


FROZEN_INSTEAD = "the part would not learn (model.vlm.freeze_vision and freeze_language freeze parts)"


@dataclass
class PartRatesConfig:
    """Factors of the learning rate, one for each part of the model. A part is frozen with `model.vlm.freeze_*` and not
    here. The names of the fields are those of `Part`."""

    vision_tower: float = setting(1.0, on_resume=Resume.noted, low=SMALLEST, high=10**6, outside=FROZEN_INSTEAD)
    """The vision tower, without its projector, learns at so many times the learning rate."""
    projector: float = setting(1.0, on_resume=Resume.noted, low=SMALLEST, high=10**6, outside=FROZEN_INSTEAD)
    """What leads from the tower to the language model (merger, connector) learns at so many times the learning rate."""
    language_model: float = setting(1.0, on_resume=Resume.noted, low=SMALLEST, high=10**6, outside=FROZEN_INSTEAD)
    """Embedding, layers and last norm, a head that is tied to the embedding, and the value head of
    `algorithm.advantage=gae`: so many times the learning rate."""
    head: float = setting(1.0, on_resume=Resume.noted, low=SMALLEST, high=10**6, outside=FROZEN_INSTEAD)
    """A head of its own, not tied to the embedding: so many times the learning rate."""


@dataclass
class SFTConfig:
    """Supervised steps: the warm-up before RL (`mode=rl`) or the whole run (`mode=sft`)."""

    steps: int = setting(
        0, on_resume=Resume.noted, low=0, high=10**9, outside="it is not a number of steps (0 is no warm-up)"
    )
    """Optimizer steps; 0 skips the warm-up."""
    batch_size: int = setting(
        64, on_resume=Resume.noted, low=1, high=2**16, outside="a supervised step has nothing to learn from"
    )
    """Conversations per optimizer step."""
    learning_rate: float = setting(1.5e-3, on_resume=Resume.noted, low=SMALLEST, high=100, outside="nothing is learned")
    """Step size of AdamW, constant over the supervised steps."""
    demonstrations: Demonstrations = setting(Demonstrations.random, on_resume=Resume.noted)
    """What the assistant says in supervised samples."""
    rl_weight: float = setting(0.0, on_resume=Resume.noted, low=0, high=10**6, outside="demonstrations are unlearned")
    """Weight of supervised samples in RL: each step's loss gets this times the mean negative log-likelihood of
    `rl_batch_size` more demonstrations (PPO-ptx, arXiv 2203.02155, eq. 2). With random answers, it keeps the policy
    from becoming certain of an answer that no reward has confirmed: certainty ends exploration, and an answer that is
    never tried is never learned. The weight falls with the learning rate, because the policy should be certain in the
    end."""
    rl_batch_size: int = setting(
        16, on_resume=Resume.noted, low=1, high=2**16, outside="there are no demonstrations to weigh"
    )
    """Conversations per RL step, where `rl_weight` is above 0."""


@dataclass
class TrainerConfig:
    """The trainer: it computes the loss and updates the weights."""

    max_steps: int = setting(400, on_resume=Resume.noted, low=1, high=10**9, outside="nothing is learned")
    """Optimizer steps of RL, or batches where each has several of them (`algorithm.epochs`, `minibatches`)."""
    max_epochs: float | None = setting(
        None, on_resume=Resume.noted, low=SMALLEST, high=10**6, outside="nothing is learned"
    )
    """Passes over the training rows after which the run ends, in place of `max_steps`: 3 or 0.5. With mode=sft, passes
    of the supervised steps, in place of `warmup.steps`. For tasks that have a number of rows."""
    seq_len: int = setting(1024, on_resume=Resume.noted, low=1, high=2**24, outside="no sample fits")
    """The most tokens of a sample; a rollout stops before it gets longer."""
    packing: Packing = setting(Packing.tree, on_resume=Resume.free)
    """How samples share a micro-batch."""
    micro_batch_tokens: int = setting(16384, on_resume=Resume.free, low=1, high=2**31 - 1, outside="no sample fits")
    """Positions per forward/backward pass, counted after packing. A single tree or sample may exceed it alone."""
    sharding: Sharding = setting(Sharding.full, on_resume=Resume.free)
    """What each rank holds, where torchrun or Slurm started several ranks."""
    cpu_offload: bool = setting(False, on_resume=Resume.free)
    """Keep the trainable float32 weights, the gradients and the optimizer state in the host's memory, and run AdamW
    there: for a model that does not fit on the GPU otherwise. It has no effect where the model is on a CPU."""
    optimizer: Optimizer = setting(Optimizer.adamw, on_resume=Resume.refused)
    """AdamW and the number format of its averages."""
    compile: bool | None = setting(False, on_resume=Resume.free)
    """Compile each layer with `torch.compile`: it reads and writes memory less often and takes a minute at the start,
    five on a CPU. null: on a GPU only; config.yaml says which."""
    activation_checkpointing: bool = setting(False, on_resume=Resume.free)
    """Keep only the input of each layer and compute the layer again in the backward pass: a third more work and a
    fraction of the memory, so more tokens fit in a micro-batch."""
    feature_cache_mib: int = setting(
        1024, on_resume=Resume.free, low=0, high=2**24, outside="it is not a number of bytes (0 keeps nothing)"
    )
    """Bytes, in MiB, of image features to keep on the trainer's device; used only where the vision tower is frozen."""
    learning_rate: float = setting(1e-6, on_resume=Resume.noted, low=SMALLEST, high=100, outside="nothing is learned")
    """Highest step size of AdamW. The default suits pretrained weights; the option of `model` sets its own."""
    part_rates: PartRatesConfig = field(default_factory=PartRatesConfig)
    """Factors of `learning_rate`, and of `warmup.learning_rate`, for the parts of the model."""
    lr_warmup_steps: int = setting(0, on_resume=Resume.noted, low=0, high=10**9, outside="it is not a number of steps")
    """Optimizer steps over which the learning rate rises linearly from 0."""
    decay: Decay = setting(Decay.linear, on_resume=Resume.noted)
    """How the learning rate falls from there to `max_steps`."""
    min_lr_ratio: float = setting(
        0.1, on_resume=Resume.noted, low=0, high=1, outside="the decay ends below 0 or above its start"
    )
    """Share of `learning_rate` at which the decay ends."""
    decay_share: float = setting(
        0.2, on_resume=Resume.noted, low=SMALLEST, high=1, outside="no step decays or more than all of them"
    )
    """With `decay=wsd`, the share of the steps after the warm-up that decays."""
    betas: tuple[float, float] = setting(
        (0.9, 0.95), on_resume=Resume.noted, low=0, high=1 - 2**-53, outside="an average of AdamW never changes"
    )
    """Shares of the old values that AdamW's averages of the gradient and of its square keep at a step."""
    eps: float = setting(
        1e-8, on_resume=Resume.noted, low=1e-30, high=1, outside="AdamW divides by 0 or by little else than eps"
    )
    """AdamW's epsilon, in the gradient's unit; added to the root of the average square."""
    weight_decay: float = setting(0.0, on_resume=Resume.noted, low=0, high=10**4, outside="weights grow on their own")
    """Share of a weight that AdamW subtracts at a step, times the learning rate (decoupled). Biases and the scales of
    norms do not decay."""
    ema: float | None = setting(None, on_resume=Resume.noted, low=0, high=1 - 2**-53, outside="it is no average")
    """The share of itself that a moving average of the weights keeps at each optimizer step, supervised ones too: 0.99
    looks back about 100 steps. The average is kept in float32 beside the weights and saved in checkpoints; `mode=export
    export.weights=average` writes it. null keeps none."""
    max_grad_norm: float = setting(
        1.0, on_resume=Resume.noted, low=1e-12, high=math.inf, outside="every gradient is scaled to nothing"
    )
    """The gradient is scaled down to this L2 norm over all parameters; `inf` leaves it as it is."""
    threads: int = setting(1, on_resume=Resume.free, low=1, high=1024, outside="torch has no thread to run on")
    """torch threads on a CPU. On a shared machine, one is safer than two."""
    checkpoint_every: int = setting(
        20,
        on_resume=Resume.free,
        low=0,
        high=10**9,
        outside="it is not a number of steps (0 writes one at the end only)",
    )
    """Optimizer steps between checkpoints; 0 writes one at the end only."""
    keep_checkpoints: int = setting(
        2, on_resume=Resume.free, low=1, high=10**9, outside="there is nothing to resume from"
    )
    """Number of newest checkpoints to keep; older ones are deleted, except the best one (`keep_best`)."""
    keep_best: str | None = setting(None, on_resume=Resume.noted, form=METRIC)
    """A metric of the evaluations, e.g. `eval/reward` or `eval/ood/pass@8`. An evaluation with a better value than all
    before saves a checkpoint, which is kept; checkpoints/best.json names it. Larger is better, except for a metric
    named `loss` or `…_loss`; of equal values the earlier counts. With mode=sft it is `eval/demonstration_loss`, with
    mode=dpo also `eval/dpo/accuracy` and the like. null keeps the newest only."""
    patience: int | None = setting(
        None, on_resume=Resume.noted, low=1, high=10**9, outside="the run ends at its first evaluation"
    )
    """Evaluations in a row without a better value of `keep_best` after which the run ends. null runs all steps."""
    warmup: SFTConfig = field(default_factory=SFTConfig)
    """Supervised steps."""
