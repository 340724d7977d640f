"""What `rewrite` spells out, and what Hydra then makes of it."""

from __future__ import annotations

from collections.abc import Callable

import hypothesis
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import strategies as st
from omegaconf import DictConfig

from vlmrl.cli.arguments import as_text, quoted, rewrite, text_keys
from vlmrl.errors import ConfigError


def test_rewrite_leaves_the_rest_alone() -> None:
    arguments = ["--multirun", "task=color_codeword", "task.max_turns=2", "model.name=a:b", "seed=1,2"]
    assert rewrite(arguments) == arguments


def test_rewrite_import_path() -> None:
    assert rewrite(["algorithm=a.b:c"]) == ["algorithm.loss=a.b:c"]
    assert rewrite(["task=a.b:C", "task.args.x.y=1"]) == ["task=imported", "task.target=a.b:C", "++task.args.x.y=1"]


def test_import_paths_are_not_swept_together_with_names() -> None:
    with pytest.raises(ConfigError, match="mixes import paths with names of options"):
        rewrite(["task=color_codeword,a.b:C"])


@pytest.mark.parametrize(
    "text",
    [
        "date=2024/x",
        "日本.parquet",
        "data(1).parquet",
        "https://host/x?a=1",
        "data/{a,b}.parquet",
        "train[:500]",
        r"\boxed{}",
        "it's {here}",
        "a#b",
        "plain/name",
    ],
)
def test_a_text_that_hydra_does_not_parse(text: str, composed: Callable[..., DictConfig]) -> None:
    assert composed(*rewrite([f"model.name={text}"])).model.name == text


def test_the_home_folder(composed: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert composed(*rewrite(["model.name=~/x y", "export.folder=~/out"])).model.name == "/home/me/x y"
    assert rewrite(["~model/vlm", "hydra.run.dir=~/runs"]) == ["~model/vlm", "hydra.run.dir=/home/me/runs"]


def test_values_of_a_sweep_stay_several() -> None:
    sweep = ["--multirun", "model.name=a(1),b"]
    assert rewrite(sweep[1:]) == ["model.name='a(1),b'"]
    assert rewrite(["--multirun", "model.name=x=1,y"]) == ["--multirun", "model.name='x=1',y"]


@hypothesis.given(st.text(st.characters(blacklist_categories=("Cc", "Cs"), blacklist_characters="$")))
def test_quoted_texts_come_back(text: str) -> None:
    """`$` is left out, because `${` begins an interpolation in quotes too."""
    assert OverridesParser.create().parse_override(f"model.name={quoted(text)}").value() == text


@pytest.mark.parametrize("text", ["/x/y=z", "日本", "a b(c)", "{{ question }}", "it's, a comma=1", "x#y", "C:\\a=b"])
def test_a_text_for_a_users_task(text: str, composed: Callable[..., DictConfig]) -> None:
    """Quoted where Hydra's grammar cannot parse it, and where it is not the begin of a list or a call."""
    config = composed(*rewrite(["task=a.b:C", f"task.args.x={text}"]))
    assert config.task.args.x == text
    for unclear in ("[a=b", "{a", "'a", "range(1", "choice(a=b)"):
        assert rewrite([f"task.args.x={unclear}"]) == [f"++task.args.x={unclear}"], "left to Hydra"


def test_only_text_keys_are_quoted() -> None:
    assert {"model.name", "algorithm.loss", "task.target", "inference.kind"} - text_keys() <= {"inference.kind"}
    assert not {"resume", "run", "seed", "mode"} & text_keys()
    assert rewrite(["seed=[1"]) == ["seed=[1"], "left to Hydra, which says what is wrong"
    assert as_text("model.name", '"quoted already, {}"', is_multirun=False) == '"quoted already, {}"'
