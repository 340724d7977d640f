"""Which run starts when the command line says little: the recipe, and defaults that fit any task."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from vlmrl.cli.recipe import RECIPE, with_recipe
from vlmrl.config.algorithm import Credit
from vlmrl.config.conf_folder import CONF
from vlmrl.config.run import RunConfig

OLD_DEFAULT = {
    "model.name": "qwen3vl_tiny",
    "model.dtype": "float32",
    "task.target": "vlmrl.tasks.color_codeword:ColorCodeword",
    "task.max_turns": 2,
    "task.images_per_turn": 2,
    "task.image_size": 32,
    "orchestrator.renderer.name": "auto",
    "orchestrator.groups_per_step": 9,
    "orchestrator.group_size": 32,
    "orchestrator.max_new_tokens": 10,
    "orchestrator.temperature": 1.0,
    "orchestrator.max_staleness": 0,
    "orchestrator.eval.every": 10,
    "orchestrator.eval.problems": 128,
    "orchestrator.eval.target": 0.95,
    "orchestrator.eval.consecutive": 2,
    "algorithm.loss": "grpo",
    "algorithm.advantage": "group_normalized",
    "algorithm.credit": "turn",
    "algorithm.clip_low": 0.2,
    "algorithm.clip_high": 0.28,
    "inference.kind": "embedded",
    "inference.max_model_len": 1024,
    "trainer.max_steps": 400,
    "trainer.learning_rate": 1.5e-3,
    "trainer.lr_warmup_steps": 0,
    "trainer.decay": "linear",
    "trainer.min_lr_ratio": 0.1,
    "trainer.betas": [0.9, 0.95],
    "trainer.max_grad_norm": 0.3,
    "trainer.warmup.steps": 100,
    "trainer.warmup.batch_size": 64,
    "trainer.warmup.learning_rate": 1.5e-3,
    "trainer.warmup.demonstrations": "random",
    "trainer.warmup.rl_weight": 0.04,
    "trainer.warmup.rl_batch_size": 16,
    "weight_sync.kind": "in_process",
}
"""What `python -m vlmrl` ran in the first version."""


def values(config: DictConfig) -> dict[str, object]:
    tree = OmegaConf.create(OmegaConf.to_yaml(config, resolve=True))
    return {key: OmegaConf.select(tree, key) for key in OLD_DEFAULT}


@pytest.mark.parametrize("overrides", [(), ("trainer.seq_len=1024",), (RECIPE,)])
def test_the_default_run_is_that_of_the_first_version(
    overrides: tuple[str, ...], composed: Callable[..., DictConfig]
) -> None:
    assert values(composed(*overrides)) == OLD_DEFAULT


def test_single_values_win_over_the_recipe(run_config: Callable[..., RunConfig]) -> None:
    config = run_config("orchestrator.group_size=4", "trainer.warmup.steps=0", "algorithm=gspo")
    assert (config.orchestrator.group_size, config.trainer.warmup.steps) == (4, 0)
    assert config.algorithm.clip_high == 4e-4, "an experiment's own algorithm.* would win over the chosen algorithm"


@pytest.mark.parametrize(
    "overrides", [("task=color_codeword",), ("model=qwen3vl_tiny",), ("~experiment",), ("experiment=[]",)]
)
def test_without_the_recipe_nothing_is_tuned_for_one_task(
    overrides: tuple[str, ...], run_config: Callable[..., RunConfig]
) -> None:
    config = run_config(*overrides)
    assert (config.orchestrator.groups_per_step, config.orchestrator.group_size) == (8, 8)
    assert (config.orchestrator.max_new_tokens, config.orchestrator.eval.target) == (64, None)
    assert (config.trainer.warmup.steps, config.trainer.warmup.rl_weight) == (0, 0.0)
    assert config.trainer.learning_rate == 1.5e-3, "it belongs to the model"
    assert config.algorithm.credit is Credit.turn, "it belongs to the task"


def test_a_task_of_the_users_own_learns_from_the_episode(run_config: Callable[..., RunConfig]) -> None:
    assert run_config("task=imported", "task.target=a.b:C").algorithm.credit is Credit.episode
    assert run_config("task=imported", "task.target=a.b:C", "task.credit=turn").algorithm.credit is Credit.turn
    assert run_config("task=color_codeword", "algorithm.credit=episode").algorithm.credit is Credit.episode


def test_the_learning_rate_comes_with_the_model(run_config: Callable[..., RunConfig]) -> None:
    assert run_config("model=qwen3vl").trainer.learning_rate == 1e-6
    assert run_config("model=qwen3vl", "trainer=scratch").trainer.learning_rate == 1.5e-3


@pytest.mark.parametrize(
    "argument",
    [
        *("task=color_codeword", "model=qwen3vl", "model=qwen3vl,qwen3vl_tiny", "experiment=color_codeword_4b"),
        *("experiment=[]", "~experiment", "~experiment=x", "+experiment=x", "task@task=imported", "--config-name=mine"),
        *("-sc", "-cn"),
    ],
)
def test_no_recipe(argument: str) -> None:
    assert with_recipe([argument]) == [argument]


@pytest.mark.parametrize(
    "arguments",
    [
        *([], ["seed=1"], ["--multirun", "seed=0,1"], ["model.name=x", "task.max_turns=1"], ["model/lora=all_linear"]),
        *(["mode=eval"], ["algorithm=rloo"], ["explain", "model"], ["+sweep=algorithms"], ["+sweep=staleness"]),
        ["trainer=finetune"],
    ],
)
def test_recipe(arguments: list[str]) -> None:
    assert with_recipe(arguments) == [*arguments, RECIPE]


@pytest.mark.parametrize(
    "sweep",
    [
        "defaults:\n  - override /model: qwen3vl\n",
        "defaults:\n  - override /experiment: color_codeword_4b\n",
        "hydra:\n  sweeper:\n    params:\n      task: color_codeword,imported\n",
    ],
)
@pytest.mark.parametrize("flag", ["--config-dir", "-cd", "--config-dir="])
def test_no_recipe_where_a_sweep_chooses(sweep: str, flag: str, tmp_path: Path) -> None:
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep/mine.yaml").write_text(f"# @package _global_\n{sweep}")
    flags = [f"{flag}{tmp_path}"] if flag.endswith("=") else [flag, str(tmp_path)]
    arguments = [*flags, "+sweep=mine"]
    assert with_recipe(arguments) == arguments
    assert with_recipe(flags) == [*flags, RECIPE]


def test_no_task_file_sets_another_group() -> None:
    for path in (CONF / "task").glob("*.yaml"):
        text = path.read_text()
        assert "override" not in text, path
        assert "@_global_" not in text.replace("@_here_", ""), path
        assert "# @package" not in text, path


def test_no_experiment_for_every_algorithm_sets_an_algorithms_values() -> None:
    tree = OmegaConf.load(CONF / "experiment/color_codeword_tiny.yaml")
    assert "algorithm" not in tree, "its values would win over those of algorithm=<option>"
