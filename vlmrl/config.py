"""RunConfig, the root schema, and what no single field can say: the checks across fields.

Every group's dataclass lives with its owner (`vlmrl/<group>/config.py`); YAML files in conf/ hold choices only.

    command line ─▶ Hydra composes conf/ against the schemas ─▶ parse: DictConfig to RunConfig ─▶ check ─▶ the run

Types, unknown keys and enum values are refused by the schemas while composing. `check` refuses what is well typed and
cannot run. Left out on purpose: whatever takes the model, the data or the machine to find out.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeAlias
from urllib.parse import urlsplit

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vlmrl.errors import ConfigError
from vlmrl.inference.config import EmbeddedConfig, InferenceConfig, VllmConfig
from vlmrl.models.config import Dtype, ModelConfig
from vlmrl.monitor.config import MonitorConfig
from vlmrl.orchestrator.config import AlgorithmConfig, OrchestratorConfig
from vlmrl.tasks.config import ColorCodewordConfig, ImportedTaskConfig, TaskConfig
from vlmrl.trainer.config import TrainerConfig
from vlmrl.weight_sync.config import (
    CudaIpcSyncConfig,
    FolderSyncConfig,
    InProcessSyncConfig,
    NcclSyncConfig,
    WeightSyncConfig,
)


class Mode(Enum):
    """What the command does."""

    rl = "rl"
    """A supervised warm-up where `trainer.warmup.steps` asks for one, then reinforcement learning."""
    sft = "sft"
    """Supervised learning only: `trainer.warmup` is the whole run."""
    eval = "eval"
    """Held-out evaluation of the policy as it is."""
    doctor = "doctor"
    """A few problems through renderer, engine and trainer: do they agree? To be asked before a long run."""


@dataclass
class RunConfig:
    """One run."""

    mode: Mode = Mode.rl
    """What the command does."""
    seed: int = 0
    """Of problems, sampling and everything random but the tiny checkpoint's weights (`model.tiny.seed`)."""
    resume: str | None = None
    """A run folder to continue; its config.yaml is taken, overrides of single values apply on top."""
    output_dir: str = MISSING
    """The run's own folder, absolute; filled in from `hydra.run.dir` (`outputs/<date>/<time>_<model>_<task>`)."""
    model: ModelConfig = MISSING
    """The policy."""
    task: TaskConfig = MISSING
    """What is learned."""
    orchestrator: OrchestratorConfig = MISSING
    """Rollouts and the loop."""
    algorithm: AlgorithmConfig = MISSING
    """From rewards to a loss."""
    inference: InferenceConfig = MISSING
    """The sampler."""
    trainer: TrainerConfig = MISSING
    """The learner."""
    weight_sync: WeightSyncConfig = MISSING
    """How a policy version reaches the sampler."""
    monitor: MonitorConfig = MISSING
    """What a run shows and leaves."""


SCHEMAS: dict[str, dict[str, type]] = {
    "task": {"color_codeword": ColorCodewordConfig, "imported": ImportedTaskConfig},
    "inference": {"embedded": EmbeddedConfig, "vllm": VllmConfig},
    "weight_sync": {
        "in_process": InProcessSyncConfig,
        "folder": FolderSyncConfig,
        "nccl": NcclSyncConfig,
        "cuda_ipc": CudaIpcSyncConfig,
    },
}
"""Groups whose options differ in their fields: option → schema. Elsewhere RunConfig's field has the schema."""


def register_schemas() -> None:
    """Put the schemas where the defaults lists of conf/ find them: `run_schema`, `task/color_codeword_schema`, …"""
    store = ConfigStore.instance()
    store.store(name="run_schema", node=RunConfig)
    for group, options in SCHEMAS.items():
        for option, schema in options.items():
            store.store(group=group, name=f"{option}_schema", node=schema)


def typed(tree: DictConfig) -> DictConfig:
    """Give the tree of a run's config.yaml its types back. Raises ConfigError where it does not fit the schema.

    The options of `SCHEMAS` are told apart by their fields, `kind` by its value too.
    """
    config = OmegaConf.structured(RunConfig)
    try:
        for group, options in SCHEMAS.items():
            node = tree[group] if OmegaConf.is_dict(tree.get(group)) else {}
            for schema in options.values():
                fields = {field.name: field.default for field in dataclasses.fields(schema)}
                if set(node) == set(fields) and node.get("kind") == fields.get("kind"):
                    config[group] = schema
        config = OmegaConf.merge(config, tree)
    except OmegaConfBaseException as error:
        raise ConfigError(
            f"config.yaml does not fit the schema ({summary(error)}), so this version of vlmrl did not write it: "
            "continue the run with the version that its `environment` names"
        ) from error
    assert isinstance(config, DictConfig)
    OmegaConf.set_struct(config, True)
    return config


def parse(config: DictConfig) -> RunConfig:
    """Turn a composed config into a checked RunConfig. Raises ConfigError."""
    try:
        for key in _missing_keys(config):
            raise ConfigError(f"{key} has no value, so the run cannot start: set {key}=…")
        for key in _stray_keys(config, ""):
            raise ConfigError(f"{key}: {unknown_key(key)}")
        run_config = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise ConfigError(summary(error)) from error
    assert isinstance(run_config, RunConfig)
    check(run_config)
    return run_config


def unknown_key(key: str) -> str:
    """What to say about a key that no schema has.

    >>> unknown_key("trainer.lr")
    'there is no such key; did you mean trainer.learning_rate or trainer.warmup.learning_rate?'
    >>> unknown_key("group_size")
    'there is no such key; did you mean orchestrator.group_size?'
    """
    return "there is no such key" + did_you_mean(key, known_keys())


def did_you_mean(word: str, candidates: Sequence[str]) -> str:
    """`; did you mean a or b?`, or nothing where no candidate is close.

    Dotted names are close by their last part, initials included (`lr`); the rest decides between equals.
    """
    last_part = word.rpartition(".")[2]
    scores = {}
    for candidate in candidates:
        name = candidate.rpartition(".")[2]
        initials = "".join(part[:1] for part in name.split("_"))
        likeness = 1.0 if last_part == initials else difflib.SequenceMatcher(None, last_part, name).ratio()
        if likeness >= 0.7:
            scores[candidate] = likeness + difflib.SequenceMatcher(None, word, candidate).ratio() / 2
    best = [candidate for candidate in scores if scores[candidate] > max(scores.values()) - 0.1]
    return f"; did you mean {' or '.join(best[:3])}?" if best else ""


def summary(error: OmegaConfBaseException) -> str:
    """The key and the first line of what OmegaConf says about it."""
    text = str(error).splitlines()[0]
    return f"{error.full_key}: {text}" if error.full_key else text


def _stray_keys(config: DictConfig, prefix: str) -> Iterator[str]:
    """Keys that `+key=value` added to a node whose schema does not have them."""
    schema = OmegaConf.get_type(config)
    fields = {field.name for field in dataclasses.fields(schema)} if dataclasses.is_dataclass(schema) else set(config)
    for name in config:
        assert isinstance(name, str)
        if name not in fields:
            yield prefix + name
        elif not OmegaConf.is_missing(config, name) and isinstance(config[name], DictConfig):
            yield from _stray_keys(config[name], f"{prefix}{name}.")


def known_keys() -> list[str]:
    """Every key that can be set, dotted; of all the schemas, without the groups themselves.

    >>> [key for key in known_keys() if key.endswith("image_size")]
    ['task.image_size']
    """
    return sorted(set(_keys_of(RunConfig, "")))


def _keys_of(schema: type, prefix: str) -> Iterator[str]:
    types = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        key = prefix + field.name
        choices = [types[field.name], *typing.get_args(types[field.name]), *SCHEMAS.get(key, {}).values()]
        nested = [choice for choice in choices if isinstance(choice, type) and dataclasses.is_dataclass(choice)]
        if not nested:
            yield key
        for choice in nested:
            yield from _keys_of(choice, f"{key}.")


def _missing_keys(config: DictConfig) -> Iterator[str]:
    # Groups first: values of others may be interpolated from them.
    yield from (field.name for field in dataclasses.fields(RunConfig) if OmegaConf.is_missing(config, field.name))
    yield from sorted(OmegaConf.missing_keys(config))


# ── checks ──────────────────────────────────────────────────────────────────────────────────────────────────


def check(config: RunConfig) -> None:
    """Refuse a config that is well typed and cannot run. Raises ConfigError.

    The message says `a=x requires b, else <consequence>: <remedy>`.
    """
    for holds in CHECKS:
        holds(config)


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
                demand = "above 0" if low == SMALLEST else f"{low:g} or more"
                limit = "" if high == math.inf else " and finite" if high == LARGEST else f" and at most {high:g}"
                raise ConfigError(f"{key}={value} requires a value {demand}{limit}, else {consequence}: set another")


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
    ("orchestrator.eval.consecutive", 1, math.inf, "the target is met before the first evaluation"),
    ("inference.replicas", 1, math.inf, "there is no server"),
    ("inference.tensor_parallel_size", 1, math.inf, "no GPU holds the weights"),
    ("inference.data_parallel_size", 1, math.inf, "there is no engine behind a server"),
    ("inference.gpu_memory_utilization", SMALLEST, 1, "it is no share of a GPU's memory"),
    ("inference.kv_cache_gib", 1, math.inf, "no token has a place"),
    ("inference.startup_timeout_s", SMALLEST, math.inf, "no server is up in time"),
    ("inference.request_timeout_s", SMALLEST, math.inf, "no answer comes in time"),
    ("inference.max_restarts", 0, math.inf, "it counts no restarts (0 is none)"),
    ("inference.max_retries", 0, math.inf, "it counts no retries (0 is none)"),
    ("algorithm.clip_low", 0, 1, "it clips no ratio or every one"),
    ("algorithm.clip_high", 0, math.inf, "it clips every ratio"),
    ("algorithm.importance_cap", 1, math.inf, "it cuts tokens that are on-policy"),
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
    ("task.images_per_turn", 1, math.inf, "there is nothing to read"),
    ("task.image_size", 1, math.inf, "an image has no pixel"),
    ("task.holdout_one_in", 2, math.inf, "no codeword is left to train on"),
    ("monitor.wandb.rollouts", 0, math.inf, "it counts no rollouts"),
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


def renderer_is_there(config: RunConfig) -> None:
    """Nobody but the renderer makes tokens and pixels."""
    if config.orchestrator.renderer is not None:
        return
    if config.model.vlm is not None:
        raise ConfigError(
            "model.vlm requires orchestrator.renderer, else nobody makes the image tokens and pixels that "
            f"{config.model.name} is trained on: set orchestrator/renderer=auto"
        )
    raise ConfigError(
        f"model.name={config.model.name} requires orchestrator.renderer, else nobody makes its tokens: set "
        "orchestrator/renderer=auto orchestrator.renderer.name=qwen3, or another name of the `renderers` package"
    )


def renderer_serves_family(config: RunConfig) -> None:
    """The renderer knows the model's placeholders."""
    vlm, renderer = config.model.vlm, config.orchestrator.renderer
    assert renderer is not None, "renderer_is_there comes first"
    if vlm is None:
        if renderer.name == "auto":
            raise ConfigError(
                "orchestrator.renderer.name=auto requires model.vlm, else there are no model.vlm.renderers to take "
                "the first of: set orchestrator.renderer.name=qwen3, or another name of the `renderers` package"
            )
        return
    if not vlm.renderers:
        raise ConfigError(
            "model.vlm.renderers=[] requires at least one name, else no renderer can serve the model: "
            "name one of the `renderers` package"
        )
    if renderer.name != "auto" and renderer.name not in vlm.renderers:
        raise ConfigError(
            f"orchestrator.renderer.name={renderer.name} requires a model that it can serve, else tokens and pixels "
            f"are not those that model.vlm.family={vlm.family} was made for: set orchestrator/renderer=auto, "
            f"or one of model.vlm.renderers={','.join(vlm.renderers)}"
        )


def kinds_are_chosen(config: RunConfig) -> None:
    """`kind` is said by the group's option, not typed by hand."""
    for group in ("inference", "weight_sync"):
        node = getattr(config, group)
        if SCHEMAS[group].get(node.kind) is not type(node):
            raise ConfigError(
                f"{group}.kind={node.kind} requires the fields that go with it, else nobody knows what is meant: "
                f"choose the option instead, {group}={'|'.join(SCHEMAS[group])}"
            )


def gradients_have_range(config: RunConfig) -> None:
    """What learns is in a format that holds gradients."""
    if config.model.dtype is Dtype.float16 and config.mode is not Mode.eval:
        raise ConfigError(
            "model.dtype=float16 requires loss scaling, which the trainer does not do, else small gradients become 0: "
            "set model.dtype=bfloat16 (inference.dtype=float16 may stay: it rounds the sampler less)"
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


def groups_have_siblings(config: RunConfig) -> None:
    """An advantage is a comparison with the siblings, under each of the choices that exist."""
    if config.orchestrator.group_size < 2:
        raise ConfigError(
            f"algorithm.advantage={config.algorithm.advantage.name} requires orchestrator.group_size of at least 2, "
            "else a rollout has no sibling to be compared with and every advantage is 0: "
            "set orchestrator.group_size=2 or more"
        )


def mode_has_work(config: RunConfig) -> None:
    """Each mode has something to do."""
    if config.mode is Mode.sft and config.trainer.warmup.steps == 0:
        raise ConfigError(
            "mode=sft requires trainer.warmup.steps above 0, else there is nothing to do: set trainer.warmup.steps=100"
        )
    evaluation = config.orchestrator.eval
    if config.mode is Mode.eval and evaluation.problems == 0:
        raise ConfigError(
            "mode=eval requires orchestrator.eval.problems above 0, else there is nothing to do: "
            "set orchestrator.eval.problems=128"
        )
    if config.mode is Mode.rl and evaluation.every > 0 and evaluation.problems == 0:
        raise ConfigError(
            f"orchestrator.eval.every={evaluation.every} requires orchestrator.eval.problems above 0, else an "
            "evaluation has no problem: set orchestrator.eval.problems=128, or orchestrator.eval.every=0 for none"
        )


def optimizer_fits(config: RunConfig) -> None:
    """AdamW has its two betas, and the learning rate reaches its height within the run."""
    trainer = config.trainer
    if len(trainer.betas) != 2:
        raise ConfigError(
            f"trainer.betas={trainer.betas} requires two numbers, else AdamW lacks one: set trainer.betas=[0.9,0.95]"
        )
    if trainer.lr_warmup_steps > trainer.max_steps:
        raise ConfigError(
            f"trainer.lr_warmup_steps={trainer.lr_warmup_steps} requires trainer.max_steps at least as large, else "
            f"the run ends after {trainer.max_steps} steps, before it reaches trainer.learning_rate: lower it"
        )


def task_has_class(config: RunConfig) -> None:
    """`task.target` can be an import path."""
    module, colon, name = config.task.target.partition(":")
    if not (colon and name.isidentifier() and all(part.isidentifier() for part in module.split("."))):
        raise ConfigError(
            f"task.target={config.task.target} requires the form package.module:Class, else no class can be imported: "
            "set task=my_package.my_module:MyTask"
        )


def squares_fill_patches(config: RunConfig) -> None:
    """color_codeword: a square is whole image tokens, and an answer fits in its completion."""
    task, vlm = config.task, config.model.vlm
    if not isinstance(task, ColorCodewordConfig):
        return
    if vlm is not None and vlm.family == "qwen3_vl" and task.image_size % QWEN3_VL_TOKEN_PIXELS != 0:
        raise ConfigError(
            f"task.image_size={task.image_size} requires a multiple of {QWEN3_VL_TOKEN_PIXELS}, else the processor "
            f"of model.vlm.family=qwen3_vl rescales the squares (its tokens are {QWEN3_VL_TOKEN_PIXELS} pixels wide): "
            f"set task.image_size={max(1, round(task.image_size / QWEN3_VL_TOKEN_PIXELS)) * QWEN3_VL_TOKEN_PIXELS}"
        )
    letters = task.max_turns * task.images_per_turn
    if config.orchestrator.max_new_tokens < letters + 1:
        raise ConfigError(
            f"orchestrator.max_new_tokens={config.orchestrator.max_new_tokens} requires a codeword of fewer letters "
            f"than task.max_turns * task.images_per_turn = {letters}, else the last answer is cut before its end: "
            f"set orchestrator.max_new_tokens={letters + 1} or more"
        )


QWEN3_VL_TOKEN_PIXELS = 32
"""Pixels per side of one image token: patches of 16, merged 2 by 2."""


def tiny_is_a_model(config: RunConfig) -> None:
    """A checkpoint that is built here is a Qwen3-VL whose sizes fit each other."""
    if config.model.tiny is None:
        return
    if config.model.vlm is None or config.model.vlm.family != "qwen3_vl":
        raise ConfigError(
            "model.tiny requires model.vlm.family=qwen3_vl, else the Qwen3-VL that it builds is loaded as another "
            "model: drop the change to model.vlm, or load a checkpoint with model=qwen3vl model.name=…"
        )
    from vlmrl.models.tiny import check_tiny

    check_tiny(config.model)


Check: TypeAlias = Callable[[RunConfig], None]

CHECKS: tuple[Check, ...] = (
    renderer_is_there,
    renderer_serves_family,
    numbers_in_range,
    kinds_are_chosen,
    gradients_have_range,
    weights_reach_engine,
    embedded_is_in_step,
    context_holds_samples,
    groups_have_siblings,
    mode_has_work,
    optimizer_fits,
    task_has_class,
    squares_fill_patches,
    tiny_is_a_model,
)
"""All of them, in the order in which they run."""
