"""The table of rules: each one refuses something, each message can be acted on, and nothing is refused twice."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from support.composing import compose_as_hydra
from support.refused_configs import PROGRAM, REFUSED
from vlmrl.cli.recipe import with_recipe
from vlmrl.config.conf_folder import PACKAGE
from vlmrl.config.keys import known_keys
from vlmrl.config.parse import parse
from vlmrl.config.run import RunConfig
from vlmrl.errors import ConfigError
from vlmrl.preflight import installed
from vlmrl.preflight.check import RULES, Stage, Submission
from vlmrl.preflight.machine import Gpu, Machine
from vlmrl.preflight.site import Site, submitted_site

REMEDY = re.compile(
    r"\b(set|choose|drop|raise|lower|remove|install|start|change|pip install|python -m vlmrl|give|write|correct|add)\b"
)


def composed_config(*overrides: str) -> RunConfig | None:
    """The typed config; None where composing or typing it fails, which no rule does."""
    try:
        return parse(compose_as_hydra(*with_recipe(["output_dir=outputs/test", *overrides])))
    except (HydraException, OmegaConfBaseException, ConfigError):
        return None


def refusal(config: RunConfig, stage: Stage, site: Site) -> tuple[str, str] | None:
    """The rule that refuses `config` first, and its message."""
    for rule in RULES:
        if stage in rule.stages:
            try:
                rule.refuse(config, site)
            except ConfigError as error:
                return rule.name, str(error)
    return None


SERVES = ("inference=vllm", "inference.slurm_tasks=1")


def later_refusals(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, str]]:
    """A refusal by each rule that runs after the first stage."""

    def refused(stage: Stage, site: Site, *overrides: str) -> tuple[str, str]:
        config = composed_config(*overrides)
        assert config is not None
        found = refusal(config, stage, site)
        assert found is not None, overrides
        return found

    for submission in (Submission(), Submission(tasks_per_node=1), Submission(nodes=2, tasks_per_node=1)):
        config = composed_config(*SERVES)
        assert config is not None
        yield refused(Stage.submitted, submitted_site(config, submission), *SERVES)
    yield refused(Stage.here, Site(ranks=2), "model.device=cuda:0", "trainer.sharding=none")
    yield refused(Stage.here, Site(ranks=2), "model.device=auto", "inference.batching=rolling")
    with monkeypatch.context() as patch:
        patch.setattr(installed, "is_installed", lambda package: False)
        yield refused(Stage.here, Site(), "inference=vllm")
    monkeypatch.setattr(installed, "is_installed", lambda package: True)
    yield refused(Stage.here, Site(), *PROGRAM, "task.command=no-such-program")
    yield refused(Stage.here, Site(), "reference=folder", f"reference.folder={folder}")
    yield refused(Stage.here, Site(), "mode=replay", f"run={folder}", "step=3")
    yield refused(Stage.here, Site(), "mode=doctor", f"against={folder}")
    yield refused(Stage.here, Site(), "mode=dpo", f"dpo.from_run={folder}")
    yield refused(Stage.here, Site(), "mode=export", f"resume={folder}", f"export.folder={folder}")
    (folder / "older/rollouts").mkdir(parents=True)
    (folder / "older/rollouts/step_000001.jsonl").touch()
    yield refused(Stage.here, Site(), f"resume={folder}/older")
    with monkeypatch.context() as patch:
        patch.setenv("VLMRL_CACHE", "/proc/absent")
        yield refused(Stage.here, Site(), "model.device=cpu")
    small = Site()
    small.machine = Machine((Gpu("0", "small", 1 << 30),), 1, 1 << 40)
    yield refused(Stage.here, small, "model=qwen3vl", "model.init=random", "model/size=2b")
    yield refused(Stage.here, Site(), "model.name=/no/such/folder", "model=qwen3vl", "model.device=cpu")
    (folder / "config.json").write_text('{"rope_scaling": {"type": "longrope"}, "max_position_embeddings": 8}')
    yield refused(Stage.here, Site(), f"model.name={folder}", "model=qwen3vl", "model.device=cpu")
    with monkeypatch.context() as patch:
        patch.setattr("torch.cuda.is_available", lambda: False)
        yield refused(Stage.here, Site(), "model=qwen3vl", "model.init=random", "model/size=2b", *NCCL)
    yield refused(Stage.here, Site(), "~model/vlm", "orchestrator.renderer.name=no-such-renderer")
    yield refused(Stage.here, Site(), "model=qwen3vl", "~model/vlm", "orchestrator.renderer.name=qwen3")
    text_only = ("model=qwen3vl", "~model/vlm", "orchestrator.renderer.name=qwen3", "model.device=cpu")
    yield refused(
        Stage.here, Site(), *text_only, "task=imported", "task.target=a.b:C", "task.max_turns=2", "tool=[zoom]"
    )


NCCL = ("inference=vllm", "weight_sync=nccl", "inference.urls=[http://127.0.0.1:1]")


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, str]]:
    """Rule and message of many refusals."""
    configs = (composed_config(*overrides) for overrides, _ in REFUSED)
    found = [refusal(config, Stage.composed, Site()) for config in configs if config is not None]
    extra = composed_config("inference=vllm", "inference.slurm_tasks=2", "inference.replicas=2")
    assert extra is not None
    found.append(refusal(extra, Stage.composed, Site()))
    negative = composed_config("trainer.learning_rate=-1")
    assert negative is not None
    found.append(refusal(negative, Stage.composed, Site()))
    with pytest.MonkeyPatch.context() as patch:
        later = list(later_refusals(tmp_path_factory.mktemp("here"), patch))
    return [each for each in found if each is not None] + later


def test_every_rule_refuses_something(refusals: list[tuple[str, str]]) -> None:
    assert {rule.name for rule in RULES} == {name for name, _ in refusals}
    assert len({rule.name for rule in RULES}) == len(RULES)


def test_every_message_names_a_setting_and_a_remedy(refusals: list[tuple[str, str]]) -> None:
    roots = {key.partition(".")[0] for key in known_keys()}
    for name, message in refusals:
        assert re.match(rf"({'|'.join(sorted(roots))})[\w.\[\]/]*", message), (name, message)
        assert REMEDY.search(message), (name, message)
        assert ", else " not in message or name == "numbers_in_range", (name, message)


# ── each refusal once ───────────────────────────────────────────────────────────────────────────────────────

ELSEWHERE = {
    "cli": "the form of the command line itself",
    "config/parse.py": "keys without a value or a schema",
    "config/keys.py": "keys that no schema has",
    "config/import_paths.py": "import paths, for the rule and for a task's own check",
    "rewards": "what a term and the user's function are",
    "tasks": "what the user's class is, and a task's own settings",
    "tools": "what a tool and the user's function are",
    "trainer/loss.py": "what the user's function returned",
    "orchestrator/advantages.py": "what the user's function returned",
    "orchestrator/eval_sets.py": "columns of a set's problems",
    "runs/preview": "rows that the data does not have",
    "runs/recorded_pairs.py": "what a run has recorded",
    "runs/problems.py": "a task without a number of rows, and a file on the disk",
    "record/hub_commits.py": "a file on the disk",
    "record/pass_rates.py": "a file on the disk",
    "preflight/estimate/plan.py": "problems of the user's task",
    "rendering/renderer.py": "what the renderer returned",
    "rendering/package.py": "renderers of the package and the user's own, for the rules and where they are made",
    "models/checkpoints/image_size.py": "settings of the checkpoint's own image processor",
    "rendering/template": "the checkpoint's own chat template and processor",
    "models/checkpoints/facts.py": "what the checkpoint's files say",
    "preflight/auto_model.py": "what is read from the checkpoint before the rules",
    "models/lora.py": "layers of the loaded model",
    "models/parts.py": "parts of the loaded model",
    "ranks": "variables of the launcher",
    "record/run_dir.py": "a folder on the disk",
    "record/lock.py": "another process in the folder",
    "weight_sync/folder.py": "a folder on the disk",
    "monitor/report/document.py": "a folder on the disk",
    "runs/lifecycle.py": "checkpoints on the disk",
    "runs/reference.py": "the tokens of the reference's checkpoint",
    "runs/serve.py": "a port of this machine that is taken",
    "runs/fault_again.py": "faults on the disk",
}
"""Where a `ConfigError` may be raised outside of preflight/rules, and what it is about there."""


def raised(source: str) -> list[str]:
    """The constant text of each `raise ConfigError(…)`, values left out."""
    texts = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            call = node.exc
            if isinstance(call.func, ast.Name) and call.func.id == "ConfigError":
                parts = [part.value for part in ast.walk(call) if isinstance(part, ast.Constant)]
                texts.append(" ".join(str(part) for part in parts if isinstance(part, str)))
    return texts


def misplaced_and_repeated(files: dict[str, str]) -> list[str]:
    """Files that refuse a configuration behind the door's back, and texts that are raised twice."""
    found, seen = [], set[str]()
    for name, source in files.items():
        texts = raised(source)
        if texts and not name.startswith(("preflight/rules/", *ELSEWHERE)):
            found.append(name)
        for text in texts:
            if re.search(r"\w", text) and text in seen:
                found.append(f"{name}: {text}")
            seen.add(text)
    return found


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    """Path below vlmrl/ → source."""
    return {path.relative_to(PACKAGE).as_posix(): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}


def test_each_refusal_exists_once(sources: dict[str, str]) -> None:
    assert misplaced_and_repeated(sources) == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("trainer/optimizer.py", 'raise ConfigError(f"trainer.betas={1} does not have two numbers")'),
        ("preflight/rules/slurm.py", None),
    ],
)
def test_a_planted_duplicate_is_caught(file: str, line: str | None, sources: dict[str, str]) -> None:
    if line is None:  # a rule copied into another module
        line = sources["preflight/rules/learning.py"].replace("from __future__ import annotations", "")
    planted = {**sources, file: f"{sources[file]}\n{line}\n"}
    assert misplaced_and_repeated(planted)


def test_every_place_that_may_refuse_does(sources: dict[str, str]) -> None:
    for place in ELSEWHERE:
        assert any(raised(source) for name, source in sources.items() if name.startswith(place)), place
