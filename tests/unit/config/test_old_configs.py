"""config.yaml files that the first version wrote still load, and mean what they meant."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from vlmrl.config.algorithm import Credit, Truncated
from vlmrl.config.parse import parse, typed
from vlmrl.config.task import ColorCodewordConfig, ImportedTaskConfig
from vlmrl.errors import ConfigError

OLD_RUNS = Path(__file__).parent / "old_runs"


def read(name: str) -> DictConfig:
    tree = OmegaConf.load(OLD_RUNS / f"{name}.yaml")
    assert isinstance(tree, DictConfig)
    return tree


@pytest.mark.parametrize(
    ("name", "schema"), [("color_codeword", ColorCodewordConfig), ("imported", ImportedTaskConfig)]
)
def test_every_old_value_is_kept(name: str, schema: type) -> None:
    tree = read(name)
    config = parse(typed(tree))
    assert type(config.task) is schema
    del tree.model.vlm.flat_mm_kwargs  # left out: vLLM's own processor says it
    loaded = OmegaConf.create(OmegaConf.to_yaml(OmegaConf.structured(config)))
    assert OmegaConf.merge(loaded, tree) == loaded, "every key of the file has its value"
    assert config.task.kind == name
    assert config.task.credit is config.algorithm.credit is Credit.turn, "the old root gave every task turn credit"


def test_a_chosen_credit_is_kept() -> None:
    tree = read("imported")
    tree.algorithm.credit = "episode"
    config = parse(typed(tree))
    assert config.task.credit is config.algorithm.credit is Credit.episode


@pytest.mark.parametrize(("credit", "truncated"), [("turn", Truncated.zero), ("episode", Truncated.keep)])
def test_a_cut_answer_is_paid_as_before(credit: str, truncated: Truncated) -> None:
    tree = read("imported")
    tree.algorithm.credit = credit
    assert parse(typed(tree)).algorithm.truncated is truncated
    tree.algorithm.truncated = "mask"
    assert parse(typed(tree)).algorithm.truncated is Truncated.mask


def test_loading_leaves_the_tree_alone() -> None:
    tree = read("color_codeword")
    typed(tree)
    assert tree == read("color_codeword")


def test_a_task_that_no_schema_fits_is_refused() -> None:
    tree = read("color_codeword")
    tree.task.pace = 1
    with pytest.raises(ConfigError, match=r"config\.yaml does not fit the schema .*task"):
        typed(tree)


@pytest.mark.parametrize("group", ["task", "inference", "weight_sync"])
def test_an_unknown_kind_is_refused(group: str) -> None:
    tree = read("color_codeword")
    tree.task.kind = "color_codeword"
    tree[group].kind = "nonsense"
    with pytest.raises(ConfigError, match=rf"{group}.kind=nonsense"):
        typed(tree)
