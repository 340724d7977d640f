"""conf/ against the schemas: what the options set, and how a run's config.yaml becomes a config again."""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from support.composing import compose_as_hydra
from vlmrl.config.algorithm import Advantage, Credit, FilterMode, Loss
from vlmrl.config.inference import VllmConfig
from vlmrl.config.keys import did_you_mean, known_keys
from vlmrl.config.model import Dtype
from vlmrl.config.monitor import WandbMode
from vlmrl.config.parse import literal, parse, typed
from vlmrl.config.run import RunConfig
from vlmrl.config.task import ColorCodewordConfig, ImportedTaskConfig
from vlmrl.config.trainer import Decay
from vlmrl.errors import ConfigError
from vlmrl.preflight.places import gpus_needed
from vlmrl.record.run_dir import RunDir

TEXT_ONLY = ("model=qwen3vl", "~model/vlm", "model.name=some/text_model", "orchestrator.renderer.name=qwen3")


def test_default(run_config: Callable[..., RunConfig]) -> None:
    config = run_config()
    assert config.model.tiny is not None
    assert config.model.vlm is not None
    assert config.model.dtype is Dtype.float32
    assert config.orchestrator.renderer is not None
    assert config.orchestrator.renderer.name == "auto"
    assert config.algorithm.credit is Credit.turn
    assert config.inference.kind == "embedded"
    assert isinstance(config.task, ColorCodewordConfig)
    assert config.trainer.warmup.steps > 0


def test_pretrained_model_brings_its_own_trainer_values(run_config: Callable[..., RunConfig]) -> None:
    config = run_config("model=qwen3vl")
    assert config.model.name == "Qwen/Qwen3-VL-4B-Instruct"
    assert (config.model.dtype, config.model.tiny) == (Dtype.bfloat16, None)
    assert (config.trainer.learning_rate, config.trainer.decay) == (1e-6, Decay.constant)
    assert config.trainer.warmup.steps == 0
    assert config.orchestrator.max_new_tokens == 64
    # … and the command line has the last word.
    config = run_config("model=qwen3vl", "trainer=scratch", "orchestrator.max_new_tokens=16")
    assert (config.trainer.learning_rate, config.orchestrator.max_new_tokens) == (1.5e-3, 16)


@pytest.mark.parametrize(
    ("name", "advantage", "clip", "drops"),
    [
        ("grpo", Advantage.group_normalized, (0.2, 0.28), False),
        ("dr_grpo", Advantage.group_centered, (0.2, 0.28), False),
        ("dapo", Advantage.group_normalized, (0.2, 0.28), True),
        ("ppo", Advantage.gae, (0.2, 0.2), False),
        ("rloo", Advantage.leave_one_out, (0.2, 0.28), False),
        ("gspo", Advantage.group_normalized, (3e-4, 4e-4), False),
        ("cispo", Advantage.group_normalized, (1.0, 0.28), False),
    ],
)
def test_algorithms(
    name: str, advantage: Advantage, clip: tuple[float, float], drops: bool, run_config: Callable[..., RunConfig]
) -> None:
    algorithm = run_config(f"algorithm={name}").algorithm
    assert algorithm.loss == Loss[name]
    assert algorithm.advantage == advantage
    assert (algorithm.filters.zero_advantage is FilterMode.drop) == drops
    assert (algorithm.clip_low, algorithm.clip_high) == clip
    assert algorithm.credit is Credit.turn  # stated once, at the root


def test_shared_values_are_stated_once(run_config: Callable[..., RunConfig]) -> None:
    assert run_config("trainer.seq_len=2048").inference.max_model_len == 2048


def test_an_engine_brings_its_weight_sync(run_config: Callable[..., RunConfig]) -> None:
    config = run_config("inference=vllm")
    assert (config.inference.kind, config.weight_sync.kind) == ("vllm", "folder")
    assert isinstance(config.inference, VllmConfig)
    assert (config.inference.dtype, config.inference.max_model_len) == (Dtype.float32, config.trainer.seq_len)
    assert run_config("inference=vllm", "orchestrator.max_staleness=2").orchestrator.max_staleness == 2


@pytest.mark.parametrize(
    ("overrides", "wandb", "tensorboard"),
    [
        ((), WandbMode.auto, False),
        (("monitor/logger=[]",), WandbMode.disabled, False),
        (("monitor/logger=wandb",), WandbMode.offline, False),
        (("monitor/logger=[wandb,tensorboard]",), WandbMode.offline, True),
        (("monitor/logger=[tensorboard]", "monitor.wandb.mode=online"), WandbMode.online, True),
        (("monitor.wandb.mode=disabled",), WandbMode.disabled, False),
        (("monitor.wandb.mode=auto", "monitor/logger=[]"), WandbMode.auto, False),
    ],
)
def test_loggers(
    overrides: tuple[str, ...], wandb: WandbMode, tensorboard: bool, run_config: Callable[..., RunConfig]
) -> None:
    monitor = run_config(*overrides).monitor
    assert (monitor.wandb.mode, monitor.tensorboard.enabled) == (wandb, tensorboard)


def test_an_experiment_chooses_groups(run_config: Callable[..., RunConfig]) -> None:
    config = run_config("experiment=color_codeword_tiny", "model=qwen3vl")
    assert config.model.tiny is None, "the command line outranks the experiment"
    assert run_config("experiment=color_codeword_tiny").model.tiny is not None


def test_the_4b_recipe(run_config: Callable[..., RunConfig]) -> None:
    """A learner and a sampler on a GPU each: 20 steps on 100 problems."""
    config = run_config("experiment=color_codeword_4b")
    assert (config.model.name, config.model.dtype) == ("Qwen/Qwen3-VL-4B-Instruct", Dtype.bfloat16)
    assert (config.seed, config.task.num_examples, config.trainer.max_steps) == (42, 100, 20)
    assert isinstance(config.task, ColorCodewordConfig)
    assert (config.task.images_per_turn, config.task.max_turns) == (2, 2)
    orchestrator, filters = config.orchestrator, config.algorithm.filters
    assert (orchestrator.groups_per_step * orchestrator.group_size, orchestrator.group_size) == (16, 8)
    assert (orchestrator.max_new_tokens, orchestrator.max_staleness) == (64, 0)
    assert config.trainer.learning_rate == 3e-6
    assert (filters.gibberish, filters.repetition) == (FilterMode.drop, FilterMode.drop)
    assert filters.zero_advantage is FilterMode.track
    assert config.monitor.wandb.project == "multimodal-renderer"
    assert (config.inference.kind, config.weight_sync.kind) == ("vllm", "nccl")
    assert gpus_needed(config, ranks=1) == 2


def test_recipes_are_told_apart_by_what_they_are_for(run_config: Callable[..., RunConfig]) -> None:
    base, stale = (run_config(f"experiment=color_codeword_{name}") for name in ("4b", "async"))
    one = run_config("experiment=color_codeword_1gpu")
    assert stale.orchestrator.max_staleness == 2
    assert stale.algorithm.importance_correction is not base.algorithm.importance_correction
    stale.orchestrator.max_staleness = 0
    stale.algorithm.importance_correction = base.algorithm.importance_correction
    assert stale == base
    assert (one.model.name, one.weight_sync.kind) == ("Qwen/Qwen3-VL-2B-Instruct", "cuda_ipc")
    assert gpus_needed(one, ranks=1) == 1


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("model=qwen3vl", "algorithm=gspo", "mode=sft", "trainer.warmup.steps=3"),
        ("task=imported", "task.target=a.b:C", "++task.args.levels=[1,2]", "++task.args.name=x"),
        (
            "inference=vllm",
            "+inference.extra_args={max_num_seqs: 8}",
            "inference.urls=[http://h:1]",
            "weight_sync.root=/disk",
        ),
        TEXT_ONLY,
    ],
)
def test_config_yaml_config(overrides: tuple[str, ...], run_config: Callable[..., RunConfig]) -> None:
    config = run_config(*overrides)
    yaml = OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True)
    tree = OmegaConf.create(yaml)
    assert isinstance(tree, DictConfig)
    again = parse(typed(tree))
    assert again == config
    assert type(again.task) is type(config.task)


@pytest.mark.parametrize(
    ("key", "value", "fragment"),
    [
        ("trainer.max_steps", "many", "trainer.max_steps: Value 'many'"),
        ("trainer.pace", 1, "Key 'pace' not in 'TrainerConfig'"),
        ("task.pace", 1, "task"),
    ],
)
def test_a_tree_that_does_not_fit_the_schema(
    key: str, value: object, fragment: str, run_config: Callable[..., RunConfig]
) -> None:
    tree = OmegaConf.create(OmegaConf.to_container(OmegaConf.structured(run_config()), enum_to_str=True))
    assert isinstance(tree, DictConfig)
    OmegaConf.update(tree, key, value)
    with pytest.raises(ConfigError, match=r"config\.yaml does not fit") as caught:
        typed(tree)
    assert fragment in str(caught.value)


# ── keys ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_slip_of_the_keyboard_is_found() -> None:
    for key in known_keys():
        group, _, name = key.rpartition(".")
        if len(name) >= 4:
            slip = f"{group}.{name[:2]}{name[3:]}".lstrip(".")
            assert key.replace("*", "<name>") in did_you_mean(slip, known_keys()), slip


def test_nothing_is_suggested_where_nothing_is_close() -> None:
    assert did_you_mean("zzz", known_keys()) == ""


# ── texts with ${…} in config.yaml ──────────────────────────────────────────────────────────────────────────


@hypothesis.given(
    st.text(st.sampled_from("\\${}a:. '\"#")) | st.text(),
    st.lists(st.text(st.sampled_from("\\${}a"))),
)
def test_a_text_comes_back_from_config_yaml(text: str, texts: list[str]) -> None:
    """Resolved once, when it is composed; `???` is OmegaConf's mark of a missing value."""
    hypothesis.assume("???" not in (text, *texts))
    made = example_config()
    assert isinstance(made.task, ImportedTaskConfig)
    made.task.args = {"template": text, "more": {"texts": texts}}
    made.model.name = f"x{text}"
    with tempfile.TemporaryDirectory() as folder:
        run_dir = RunDir(folder)
        run_dir.write_config(made)
        first, found = run_dir.config.read_bytes(), run_dir.read_config()
        assert literal(found)["task"]["args"] == made.task.args
        again = parse(typed(found))
        assert again == made
        run_dir.write_config(again)
        assert run_dir.config.read_bytes() == first


@functools.cache
def default_imported_config() -> RunConfig:
    return parse(compose_as_hydra("task=imported", "task.target=a:B", "output_dir=/outputs/test"))


def example_config() -> RunConfig:
    return copy.deepcopy(default_imported_config())


def test_a_reference_in_a_config_yaml_is_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A foreign config.yaml reads nothing of this machine."""
    monkeypatch.setenv("SECRET_OF_MINE", "hunter2")
    run_dir = RunDir(tmp_path)
    run_dir.write_config(example_config())
    foreign = run_dir.config.read_text().replace("target: a:B", "target: ${oc.env:SECRET_OF_MINE}")
    run_dir.config.write_text(foreign.replace("args: {}", "args: {x: '${seed}'}"))
    config = parse(typed(run_dir.read_config()))
    assert config.task.target == "${oc.env:SECRET_OF_MINE}"
    assert isinstance(config.task, ImportedTaskConfig)
    assert config.task.args == {"x": "${seed}"}


def test_escaped_on_the_command_line(composed: Callable[..., DictConfig], tmp_path: Path) -> None:
    config = parse(composed("task=imported", "task.target=a:B", r"++task.args.template='\${name} is'"))
    assert isinstance(config.task, ImportedTaskConfig)
    assert config.task.args == {"template": "${name} is"}
    with pytest.raises(ConfigError, match=r"task.args.x: Interpolation key 'name' not found, .* or write \\\$\{"):
        parse(composed("task=imported", "task.target=a:B", "++task.args.x='${name} is'"))
