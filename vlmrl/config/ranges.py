"""Every number lies where it means something."""

from __future__ import annotations

import math
import sys
from typing import Any

from vlmrl.config.run import RunConfig
from vlmrl.errors import ConfigError


def numbers_in_range(config: RunConfig) -> None:
    """Every number lies where it means something."""
    for key, low, high, consequence in RANGES:
        value: Any = config
        for name in key.split("."):
            value = getattr(value, name, None)
        if value is None:  # an optional group that is not there, or another task's field
            continue
        for number in value if isinstance(value, tuple | list) else (value,):
            if not low <= number <= high:  # NaN is refused too
                raise ConfigError(
                    f"{key}={value} requires a value {_in_words(low, high)}, else {consequence}: set another"
                )


def range_text(key: str) -> str:
    """What values a key may have; "" where it is no number.

    >>> range_text("trainer.max_steps"), range_text("trainer.learning_rate"), range_text("trainer.decay")
    ('1 or more', 'above 0 and finite', '')
    """
    return next((_in_words(low, high) for name, low, high, _ in RANGES if name == key), "")


def _in_words(low: float, high: float) -> str:
    if (low, high) == (-LARGEST, LARGEST):
        return "finite"
    demand = "above 0" if low == SMALLEST else f"{low:g} or more"
    if high == 2**63 - 1:
        return f"{demand} and below 2**63"
    limit = "" if high == math.inf else " and finite" if high == LARGEST else f" and at most {high:g}"
    return demand + limit


SMALLEST, LARGEST = math.nextafter(0.0, 1.0), sys.float_info.max
"""Lower bound of numbers that must be positive, upper bound of those that must be finite."""

RANGES: tuple[tuple[str, float, float, str], ...] = (
    ("seed", 0, 2**63 - 1, "it seeds no generator"),
    ("orchestrator.groups_per_step", 1, math.inf, "a step has nothing to learn from"),
    ("orchestrator.group_size", 1, math.inf, "a group has no rollout"),
    ("orchestrator.max_new_tokens", 1, math.inf, "the policy cannot answer"),
    ("orchestrator.temperature", SMALLEST, LARGEST, "training samples greedily and siblings do not differ"),
    ("orchestrator.max_staleness", 0, math.inf, "every token is too old"),
    ("orchestrator.eval.every", 0, math.inf, "it counts no steps (0 is never)"),
    ("orchestrator.eval.problems", 0, math.inf, "it counts no problems"),
    ("orchestrator.eval.target", -LARGEST, LARGEST, "it is no reward"),
    ("orchestrator.eval.consecutive", 1, math.inf, "the target is met before the first evaluation"),
    ("inference.max_model_len", 1, math.inf, "no prompt fits"),
    ("inference.replicas", 1, math.inf, "there is no server"),
    ("inference.tensor_parallel_size", 1, math.inf, "no GPU holds the weights"),
    ("inference.data_parallel_size", 1, math.inf, "there is no engine behind a server"),
    ("inference.gpu_memory_utilization", SMALLEST, 1, "it is no share of a GPU's memory"),
    ("inference.kv_cache_gib", 1, math.inf, "no token has a place"),
    ("inference.slurm_tasks", 0, math.inf, "it counts no tasks (0 is none)"),
    ("inference.startup_timeout_s", SMALLEST, math.inf, "no server is up in time"),
    ("inference.request_timeout_s", SMALLEST, math.inf, "no answer comes in time"),
    ("inference.max_restarts", 0, math.inf, "it counts no restarts (0 is none)"),
    ("inference.max_retries", 0, math.inf, "it counts no retries (0 is none)"),
    ("algorithm.clip_low", 0, 1, "it clips no ratio or every one"),
    ("algorithm.clip_high", 0, math.inf, "it clips every ratio"),
    ("algorithm.importance_cap", 1, math.inf, "it cuts tokens that are on-policy"),
    ("algorithm.filters.rare_from", 0, 1, "it is no share of the vocabulary"),
    ("algorithm.filters.rare_logprob_offset", 0, LARGEST, "ordinary tokens of a broad distribution are rare"),
    ("algorithm.filters.repetition_window", 1, math.inf, "every rollout is a repetition"),
    ("algorithm.filters.repetition_probability", SMALLEST, 1, "it is no probability"),
    ("trainer.max_steps", 1, math.inf, "nothing is learned"),
    ("trainer.seq_len", 1, math.inf, "no sample fits"),
    ("trainer.micro_batch_tokens", 1, math.inf, "no sample fits"),
    ("trainer.learning_rate", SMALLEST, LARGEST, "nothing is learned"),
    ("trainer.lr_warmup_steps", 0, math.inf, "it counts no steps"),
    ("trainer.min_lr_ratio", 0, 1, "the decay ends below 0 or above where it began"),
    ("trainer.betas", 0, 1 - 2**-53, "an average of AdamW never forgets"),
    ("trainer.eps", SMALLEST, LARGEST, "AdamW may divide by 0"),
    ("trainer.weight_decay", 0, LARGEST, "weights grow on their own"),
    ("trainer.max_grad_norm", SMALLEST, math.inf, "every gradient is scaled to nothing"),
    ("trainer.threads", 1, math.inf, "torch has no thread to run on"),
    ("trainer.checkpoint_every", 0, math.inf, "it counts no steps (0 is only at the end)"),
    ("trainer.keep_checkpoints", 1, math.inf, "there is nothing to resume from"),
    ("trainer.warmup.steps", 0, math.inf, "it counts no steps (0 is no warm-up)"),
    ("trainer.warmup.batch_size", 1, math.inf, "a supervised step has nothing to learn from"),
    ("trainer.warmup.rl_weight", 0, LARGEST, "demonstrations are unlearned"),
    ("trainer.warmup.rl_batch_size", 1, math.inf, "there is nothing to weigh"),
    ("trainer.warmup.learning_rate", SMALLEST, LARGEST, "nothing is learned"),
    ("task.max_turns", 1, math.inf, "an episode has no turn"),
    ("task.num_examples", 1, math.inf, "there is no problem to train on"),
    ("task.images_per_turn", 1, math.inf, "there is nothing to read"),
    ("task.image_size", 1, math.inf, "an image has no pixel"),
    ("task.holdout_one_in", 2, math.inf, "no codeword is left to train on"),
    ("step", 1, math.inf, "there is no such batch"),
    ("monitor.vision_gap_every", 0, math.inf, "it counts no steps (0 is never)"),
    ("monitor.wandb.rollouts", 0, math.inf, "it counts no rollouts"),
    ("trainer.feature_cache_mib", 0, math.inf, "it counts no bytes (0 keeps nothing)"),
    ("model.lora.rank", 1, math.inf, "an adapter has no column"),
    ("model.lora.alpha", SMALLEST, LARGEST, "adapters count nothing"),
    ("model.tiny.bpe_merges", 0, math.inf, "it counts no merges"),
    *(
        (f"model.tiny.{size}", 1, math.inf, "there is no such model")
        for size in (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "vision_depth",
            "vision_hidden_size",
            "vision_intermediate_size",
            "vision_num_heads",
            "max_position_embeddings",
        )
    ),
    ("model.tiny.initializer_range", SMALLEST, LARGEST, "all weights are equal"),
    ("model.tiny.seed", 0, 2**63 - 1, "it seeds no generator"),
)
"""(key, lowest, highest, what follows outside): both ends are allowed. Keys that a config does not have are skipped."""
