"""What `rewrite` spells out, and what Hydra then makes of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from vlmrl.cli.arguments import as_text, quoted, rewrite, rewrite_params
from vlmrl.config.dataset import DatasetConfig
from vlmrl.config.parse import parse, tree_of, typed
from vlmrl.config.reward import ImportedTerm
from vlmrl.config.task import ColorCodewordConfig, MixtureConfig
from vlmrl.config.tool import ImportedTool
from vlmrl.errors import ConfigError


def test_rewrite_leaves_the_rest_alone() -> None:
    arguments = ["--multirun", "task=color_codeword", "task.max_turns=2", "model.name=a:b", "seed=1,2"]
    assert rewrite(arguments) == arguments


def test_rewrite_import_path() -> None:
    assert rewrite(["algorithm=a.b:c"]) == ["algorithm.loss=a.b:c"]
    assert rewrite(["task=a.b:C", "task.args.x.y=1"]) == ["task=a.b:C", "++task.args.x.y=1"]


def test_import_paths_are_not_swept_together_with_names() -> None:
    with pytest.raises(ConfigError, match="mixes import paths with names of options"):
        rewrite(["algorithm=rloo,a.b:c"])
    assert rewrite(["--multirun", "task=color_codeword,a.b:C"])[1] == "task=color_codeword,a.b:C", "an option like any"


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
    for key in ("model.name", "algorithm.loss", "task.target", "task.tasks.a.name", "orchestrator.renderer.name"):
        assert rewrite([f"{key}=a=b"]) == [f"{key}='a=b'"]
    for key in ("resume", "run", "seed", "mode", "no.such.key"):
        assert rewrite([f"{key}=a=b"]) == [f"{key}=a=b"]
    assert rewrite(["seed=[1"]) == ["seed=[1"], "left to Hydra, which says what is wrong"
    assert as_text("model.name", '"quoted already, {}"', is_multirun=False) == '"quoted already, {}"'


# ── tools ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        (("tool=[]",), {}),
        (("tool=zoom",), {"zoom": "zoom"}),
        (("+tool=[zoom]",), {"zoom": "zoom"}),
        (("tool=[zoom,my_module:fn]", "tool.zoom.size=64"), {"zoom": "zoom", "fn": "my_module:fn"}),
        (("tool=[a:fn,b:fn,t.py:fn]", "tool.fn.args.level=3"), {"fn": "a:fn", "fn_2": "b:fn", "fn_3": "HERE/t.py:fn"}),
        (("tool=[zoom]", "+tool@tool.closer=zoom", "tool.closer.size=32"), {"zoom": "zoom", "closer": "zoom"}),
        (("tool=[imported]", "tool.imported.target=t.py:fn"), {"imported": "HERE/t.py:fn"}),
    ],
)
def test_tools(
    overrides: tuple[str, ...],
    wanted: dict[str, str],
    composed: Callable[..., DictConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    tools = parse(composed(*rewrite([*overrides]))).tool
    found = {name: tool.target if isinstance(tool, ImportedTool) else tool.kind for name, tool in tools.items()}
    assert found == {name: text.replace("HERE", str(tmp_path)) for name, text in wanted.items()}


def test_a_sweep_over_tools_sets_their_keys_in_each_job() -> None:
    assert rewrite(["--multirun", "tool=[zoom],[]", "tool.zoom.size=64"]) == [
        "--multirun",
        "tool=[zoom],[]",
        "tool.zoom.size=choice(64)",
    ]


# ── rewards ─────────────────────────────────────────────────────────────────────────────────────────────────


def targets(config: DictConfig) -> dict[str, str]:
    """Name → import path, or kind, of each reward term."""
    terms = parse(config).reward.terms
    return {name: term.target if isinstance(term, ImportedTerm) else term.kind for name, term in terms.items()}


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        (("reward=exact",), {"exact": "exact"}),
        (("reward=[]",), {}),
        (("reward=[exact,format]",), {"exact": "exact", "format": "format"}),
        (("reward=my_module:fn",), {"fn": "my_module:fn"}),
        (("reward=[exact,my_module:fn]",), {"exact": "exact", "fn": "my_module:fn"}),
        (("reward=[ exact , my_module:fn ]",), {"exact": "exact", "fn": "my_module:fn"}),
        (("reward=folder/r.py:fn",), {"fn": "HERE/folder/r.py:fn"}),
        (("reward=[exact,r.py:fn,/other/r.py:g]",), {"exact": "exact", "fn": "HERE/r.py:fn", "g": "/other/r.py:g"}),
        (("reward=[~/日本 (1)/r.py:fn]",), {"fn": "HOME/日本 (1)/r.py:fn"}),
        (("reward=['~/a,b/r.py:fn',exact]",), {"fn": "HOME/a,b/r.py:fn", "exact": "exact"}),
        (("reward=[a:fn,b:fn,c:fn]",), {"fn": "a:fn", "fn_2": "b:fn", "fn_3": "c:fn"}),
        (("reward=[exact]", "+reward@reward.terms.second=exact"), {"exact": "exact", "second": "exact"}),
        (("reward=exact", "+reward@reward.terms.mine=r.py:fn"), {"exact": "exact", "mine": "HERE/r.py:fn"}),
        (("reward=[imported]", "reward.terms.imported.target=r.py:fn"), {"imported": "HERE/r.py:fn"}),
    ],
)
def test_rewards(
    overrides: tuple[str, ...],
    wanted: dict[str, str],
    composed: Callable[..., DictConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    found = targets(composed(*rewrite([*overrides])))
    assert found == {
        name: text.replace("HERE", str(tmp_path)).replace("HOME", "/home/me") for name, text in wanted.items()
    }


@pytest.mark.parametrize("twice", ["[exact,exact]", "[a:fn,a:fn]", "[exact],[exact,format,exact]"])
def test_equal_rewards_are_refused(twice: str) -> None:
    remedy = r"names \S+ twice, and equal names would be one: write one of them, or \+reward@reward\.terms\.second="
    with pytest.raises(ConfigError, match=remedy):
        rewrite([f"reward={twice}"])
    with pytest.raises(ConfigError, match=remedy):
        rewrite_params({"reward": twice})


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ("a:fn, b:fn", {"fn": "a:fn", "fn_2": "b:fn"}),
        ("a:fn, a:fn", "names a:fn twice"),
        ("r.py:fn, ./r.py:fn", "names ./r.py:fn twice"),
        ("exact, exact", "names exact twice"),
    ],
)
def test_rewards_of_a_file_keep_their_own_names(
    options: str, wanted: dict[str, str] | str, composed: Callable[..., DictConfig], tmp_path: Path
) -> None:
    """In a defaults list of YAML as on the command line: two functions of one name are two terms."""
    (tmp_path / "experiment").mkdir()
    text = f"# @package _global_\ndefaults:\n  - override /reward: [{options}]\n"
    (tmp_path / "experiment/mine.yaml").write_text(text)
    arguments = ("experiment=mine", f"hydra.searchpath=[file://{tmp_path}]")
    if isinstance(wanted, str):
        with pytest.raises(ConfigError, match=wanted):
            composed(*arguments)
        return
    assert targets(composed(*arguments)) == wanted


def test_rewards_of_a_sweep(composed: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/tmp")
    swept = rewrite(["--multirun", "reward=[exact],[exact,r.py:fn],[a:fn,b:fn],format"])[1]
    assert swept == "reward=[exact],[exact,/tmp/r.py:fn],[a:fn,b:fn@fn_2],format"
    assert rewrite_params({"reward": "[exact],[exact,r.py:fn]"}) == {"reward": "[exact],[exact,/tmp/r.py:fn]"}
    choices = OverridesParser.create().parse_override(swept).sweep_string_iterator()
    assert [targets(composed(f"reward={choice}")) for choice in choices] == [
        {"exact": "exact"},
        {"exact": "exact", "fn": "/tmp/r.py:fn"},
        {"fn": "a:fn", "fn_2": "b:fn"},
        {"format": "format"},
    ]


# ── data sets ───────────────────────────────────────────────────────────────────────────────────────────────


def dataset(composed: Callable[..., DictConfig], *overrides: str) -> DatasetConfig:
    """The task of a run on a data set, which has gone through a config.yaml."""
    config = parse(composed(*rewrite(["task=dataset", "task.path=x", *overrides])))
    again = parse(typed(OmegaConf.create(tree_of(config))))
    assert again == config
    assert isinstance(again.task, DatasetConfig)
    return again.task


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a.parquet", "a.parquet"),
        ("[a.parquet,b=1.parquet]", ["a.parquet", "b=1.parquet"]),
        ("a.parquet,date=2024/日本.parquet", ["a.parquet", "date=2024/日本.parquet"]),
        ("data/*.parquet", "data/*.parquet"),
        ("data/{a,b}.parquet", "data/{a,b}.parquet"),
        ("{a,b}/x.parquet", "{a,b}/x.parquet"),
        ("[data/{a,b}.parquet,c(1).csv]", ["data/{a,b}.parquet", "c(1).csv"]),
        ("train[0-9].jsonl", "train[0-9].jsonl"),
        ("hiyouga/geometry3k", "hiyouga/geometry3k"),
        ("1234", "1234"),
    ],
)
@pytest.mark.parametrize("key", ["path", "eval_path", "columns.images"])
def test_paths(key: str, text: str, wanted: object, composed: Callable[..., DictConfig]) -> None:
    task = dataset(composed, f"task.{key}={text}")
    assert {"path": task.path, "eval_path": task.eval_path, "columns.images": task.columns.images}[key] == wanted


def test_a_text_that_looks_like_a_number(composed: Callable[..., DictConfig]) -> None:
    task = dataset(composed, "task.revision=1e10", "task.name=true", "task.split=null", "task.rows=0:500")
    assert (task.revision, task.name, task.split, task.rows) == ("1e10", "true", None, "0:500")


RAW = (
    "{{ question }}",
    "Think, then answer {x}, please.",
    "costs ${price} or ${{ price }} or \\${price}",
    r"\boxed\{.*\}",
    'it\'s "quoted"',
    "${oc.env:HOME}",
    "1e5",
    "[a, b",
    "line\nbreak",
)


@pytest.mark.parametrize("text", RAW)
def test_raw_texts_on_the_command_line(text: str, composed: Callable[..., DictConfig]) -> None:
    task = dataset(composed, f"task.template={text}", f"task.system_prompt={text}", "reward=format")
    assert (task.template, task.system_prompt) == (text, text)


@pytest.mark.parametrize("text", [text for text in RAW if text != "1e5"])  # a number in YAML
def test_raw_texts_in_a_yaml_file(text: str, composed: Callable[..., DictConfig], tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    content = {"task": {"template": text, "path": "${model.name}"}, "reward": {"terms": {"format": {"pattern": text}}}}
    file = {"defaults": [{"override /task": "dataset"}, {"override /reward": ["format"]}], **content}
    (tmp_path / "experiment/mine.yaml").write_text(f"# @package _global_\n{yaml.safe_dump(file)}", "utf-8")
    config = parse(composed("experiment=mine", f"hydra.searchpath=[file://{tmp_path}]"))
    assert isinstance(config.task, DatasetConfig)
    assert (config.task.template, config.task.path) == (text, config.model.name)
    assert config.reward.terms["format"].pattern == text  # type: ignore[attr-defined]


def test_import_paths_in_a_yaml_file(composed: Callable[..., DictConfig], tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text(
        "# @package _global_\ndefaults:\n- override /task: my_tasks:Mine\n- override /reward: [exact, '/r.py:fn']\n"
    )
    config = composed("experiment=mine", f"hydra.searchpath=[file://{tmp_path}]")
    assert (parse(config).task.target, targets(config)) == ("my_tasks:Mine", {"exact": "exact", "fn": "/r.py:fn"})


def test_a_mixture_in_a_yaml_file(composed: Callable[..., DictConfig], tmp_path: Path) -> None:
    """The example of docs/mixtures.md."""
    page = (Path(__file__).parents[3] / "docs/mixtures.md").read_text()
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text(page.partition("```yaml\n")[2].partition("```")[0])
    config = parse(composed("experiment=mine", f"hydra.searchpath=[file://{tmp_path}]"))
    assert parse(typed(OmegaConf.create(tree_of(config)))) == config
    assert isinstance(config.task, MixtureConfig)
    sums, colors = config.task.tasks["sums"], config.task.tasks["colors"]
    assert isinstance(sums, DatasetConfig)
    assert (sums.path, type(colors), config.task.weights) == ("sums.jsonl", ColorCodewordConfig, {"sums": 3.0})
