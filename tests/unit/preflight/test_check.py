"""Every option of conf/ composes and is checked, and every check refuses what it is there for."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
from omegaconf import DictConfig

from support.composing import compose_as_hydra
from support.configs import checked
from support.refused_configs import MIXTURE, REFUSED
from vlmrl.cli.recipe import RECIPE
from vlmrl.config.conf_folder import CONF
from vlmrl.config.fields import Range
from vlmrl.config.keys import all_settings, groups_at
from vlmrl.config.reward import TERMS, JudgeTerm
from vlmrl.config.run import RunConfig
from vlmrl.config.task import ImportedTaskConfig
from vlmrl.errors import ConfigError
from vlmrl.preflight.check import Stage, check
from vlmrl.preflight.rules.numbers import numbers_in_range

OPTIONS = sorted(
    f"{path.parent.relative_to(CONF).as_posix()}={path.stem}" for path in CONF.rglob("*.yaml") if path.parent != CONF
)
NOT_ALONE = {
    "orchestrator/renderer=none": "orchestrator.renderer=null leaves",
    "task=imported": "task.target has no value",
    "task=clip_direction": "orchestrator.renderer.name=auto makes none",
    "task=dataset": "task.path has no value",
    "task=gymnasium": "task.env_id has no value",
    "task=program": "task.command has no value",
    "task=verifiers": "task.env has no value",
    "task=mixture": "task.tasks names no task",
    "reward=imported": "reward.terms.imported.target has no value",
    "reward=judge": "reward.terms.judge.model has no value",
    "reference=folder": "reference.folder has no value",
    "experiment=distill_tiny": "reference.folder has no value",
    "tool=imported": "tool.imported.target has no value",
    **dict.fromkeys(
        (f"reward={kind}" for kind in TERMS if kind not in ("imported", "judge")),
        "algorithm.credit=turn trains each turn on the rewards that the task gives to turns",
    ),
    "model=auto": "model.name has no value",
    "model/vlm=llava": "model.tiny builds a checkpoint, and model.vlm.image_token=auto is read from one",
    "model/vlm=auto": "model.tiny builds a checkpoint, and model.vlm.family=auto is read from one",
    **{
        f"model/vlm={path.stem}": f"model.tiny cannot build a checkpoint of model.vlm.family={path.stem}"
        for path in (CONF / "model/vlm").glob("*.yaml")
        if path.stem not in ("qwen3_vl", "llava", "auto")
    },
    **dict.fromkeys(
        ("model/size=2b", "model/size=4b", "model/size=8b", "model/size=30b_a3b"),
        "model.size has no effect with model.tiny",
    ),
    **dict.fromkeys(
        ("weight_sync=folder", "weight_sync=nccl", "weight_sync=cuda_ipc"),
        "does not work with inference=embedded",
    ),
}
"""Options that cannot run with everything else at its default, and what is said about it."""

TEXT_ONLY = ("model=qwen3vl", "~model/vlm", "model.name=some/text_model", "orchestrator.renderer.name=qwen3")


def test_options_are_those_that_the_groups_are_meant_to_have() -> None:
    assert {option.partition("=")[0] for option in OPTIONS} == {
        *(
            "model",
            "model/lora",
            "model/size",
            "model/vlm",
            "task",
            "reward",
            "tool",
            "eval_set",
            "orchestrator",
            "orchestrator/renderer",
            "reference",
            "dpo",
            "algorithm",
            "inference",
        ),
        *("trainer", "weight_sync", "monitor", "monitor/logger", "export", "preview", "play", "serve", "bench"),
        "experiment",
        *("hydra/help", "hydra/launcher"),
    }


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_composes_and_is_checked(option: str, composed: Callable[..., DictConfig]) -> None:
    if option == "hydra/launcher=slurm":
        pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    config = composed(option.replace("eval_set=", "+eval_set@orchestrator.eval.sets.some="))
    if option in NOT_ALONE:
        with pytest.raises(ConfigError, match=NOT_ALONE[option]):
            checked(config)
    else:
        assert isinstance(checked(config), RunConfig)


# ── check ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("overrides", "message"), REFUSED)
def test_refused(overrides: tuple[str, ...], message: str, composed: Callable[..., DictConfig]) -> None:
    config = composed(*overrides)
    with pytest.raises(ConfigError, match=message):
        checked(config)


@pytest.mark.parametrize(
    "overrides",
    [
        TEXT_ONLY,
        ("orchestrator/renderer=qwen3_vl",),
        ("trainer.seq_len=512", "inference.max_model_len=1024"),
        ("orchestrator.eval.every=0", "orchestrator.eval.problems=0"),
        ("task.max_turns=4", "orchestrator.max_new_tokens=9"),
        ("trainer.max_grad_norm=inf",),
        ("mode=sft",),
        ("mode=eval",),
        ("reward=format", "reward.terms.format.weight=-0.1", "algorithm.credit=episode"),
        ("mode=sft", "task=dataset", "task.path=rows.jsonl", "trainer.warmup.steps=9"),
        ("task=dataset", "task.path=rows.jsonl", "reward=exact"),
        (*MIXTURE, "+task@task.tasks.b=dataset", "task.tasks.b.path=x", "reward=exact", "algorithm.credit=episode"),
        (*MIXTURE, "++task.weights.a=0.5", "algorithm.credit=turn"),
        ("algorithm.credit=return", "algorithm.discount=0.9", "algorithm.compare=state"),
    ],
)
def test_not_refused(overrides: tuple[str, ...], run_config: Callable[..., RunConfig]) -> None:
    check(run_config(*overrides), Stage.composed)


@pytest.fixture(scope="module")
def default() -> dict[str, RunConfig]:
    """The default run of each engine; not to be changed."""
    engines = ("embedded", "vllm")
    return {name: checked(compose_as_hydra(RECIPE, "output_dir=outputs/test", f"inference={name}")) for name in engines}


def with_key(config: RunConfig, key: str) -> str:
    """Give `config` the group that holds `key`, where its options do not have it; returns the key there, in which a
    name stands for `*`."""
    *groups, name = key.split(".")
    owners = groups_at(".".join(groups)) if groups else [RunConfig]
    owner = next(owner for owner in owners if name in {field.name for field in dataclasses.fields(owner)})
    node: Any = config
    for number, group in enumerate(groups, 1):
        if group == "*":
            node = node.setdefault("some", owner())
            continue
        child = getattr(node, group)
        if child is None or (number == len(groups) and not hasattr(child, name)):
            child = owner()
            setattr(node, group, child)
        node = child
    if isinstance(node, JudgeTerm):
        node.url, node.model = "http://127.0.0.1:1/v1", "some/model"
    return key.replace("*", "some")


def set_key(config: RunConfig, key: str, value: object) -> None:
    """`key` is dotted; lists get `value` as their first item."""
    node: Any = config
    *groups, name = key.split(".")
    for group in groups:
        node = node[group] if isinstance(node, dict) else getattr(node, group)
    setattr(node, name, [value, 0.5] if isinstance(getattr(node, name), list) else value)


RANGES = {key: setting.range for key, setting in all_settings() if setting.range is not None}


@pytest.mark.parametrize(("key", "allowed"), RANGES.items(), ids=RANGES)
def test_numbers_out_of_range(key: str, allowed: Range, default: dict[str, RunConfig]) -> None:
    low, high = allowed.low, allowed.high
    config = copy.deepcopy(default["vllm" if key.startswith("inference.") else "embedded"])
    key = with_key(config, key)
    for inside in (low, high):
        set_key(config, key, inside)
        numbers_in_range(config)
    outside = [math.nextafter(low, -math.inf), math.nan, *([-1] if low >= 0 else [])]
    if high < math.inf:
        outside.append(math.nextafter(float(high), math.inf) if high <= 1 else math.inf)
    for value in outside:
        set_key(config, key, value)
        with pytest.raises(ConfigError, match=rf"^{key}=.* is out of range, and .*: set {key} to a value that is .*"):
            check(config, Stage.composed)


def test_ranges_of_another_task_are_skipped(run_config: Callable[..., RunConfig]) -> None:
    config = run_config("task=imported", "task.target=a.b:C")
    assert isinstance(config.task, ImportedTaskConfig)
    assert not hasattr(config.task, "image_size")
