"""Losses and advantages of the user's own, by import path."""

from __future__ import annotations

import importlib
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from vlmrl.config.algorithm import AlgorithmConfig, ImportanceCorrection
from vlmrl.config.import_paths import import_named
from vlmrl.config.run import RunConfig
from vlmrl.errors import ConfigError
from vlmrl.orchestrator.advantages import assign_advantages, estimator_named
from vlmrl.orchestrator.credit import Comparison, comparisons
from vlmrl.preflight.rules.imports import imports_resolve
from vlmrl.trainer.loss import BatchTotals, LossTokens, loss_function
from vlmrl.trainer.objective import policy_loss
from vlmrl.types import Completion, Group, Prompt, Rollout, StopReason, Turn

ALGORITHM = """
import numpy as np
import torch
from vlmrl.trainer.loss import LossOutput

def scaled(tokens, totals, config):
    objective = tokens.advantages * tokens.logprobs
    return LossOutput(-config.args["scale"] * objective.sum() / totals.tokens, {"my/figure": float(len(objective))})

def bare(tokens, totals, config):
    return tokens.logprobs.sum()

def two_arguments(tokens, totals):
    return None

def ranks(compared, config):
    return config.args["scale"] * (np.argsort(np.argsort(compared.rewards)) - (len(compared.rewards) - 1) / 2)

def shorter(compared, config):
    return -compared.lengths + [rollout.metrics["bonus"] for rollout in compared.rollouts]

def infinite(compared, config):
    return compared.rewards / 0.0

def one(compared, config):
    compared.rewards[:] = 7.0
    return 0.5

def of_rewards(rewards):
    return rewards

number = 3

def badly(compared, config):
    return BAD[int(compared.rewards[0])](compared.rewards)

class BadText(Exception):
    def __str__(self):
        raise SystemExit(1)

def raises(*_):
    raise BadText

async def later(*_):
    return None

def leaves(*_):
    raise SystemExit(0)

BAD = [
    raises, leaves, later,
    lambda rewards: "high",
    lambda rewards: None,
    lambda rewards: torch.tensor(rewards, requires_grad=True),
    lambda rewards: list(rewards) + [1.0],
    lambda rewards: rewards[:, None],
    lambda rewards: {"a": 1},
    lambda rewards: [float("nan")] * len(rewards),
]

def lost(tokens, totals, config):
    return BAD_LOSSES[config.args["case"]](tokens)

BAD_LOSSES = [
    raises, leaves, later,
    lambda tokens: "low",
    lambda tokens: LossOutput("low"),
    lambda tokens: LossOutput(1.0),
    lambda tokens: LossOutput(tokens.logprobs),
    lambda tokens: LossOutput(tokens.sample_index.sum()),
    lambda tokens: LossOutput(tokens.logprobs.detach().sum()),
    lambda tokens: LossOutput(tokens.logprobs.sum(), {"mine": "x"}),
    lambda tokens: LossOutput(tokens.logprobs.sum(), {3: 1.0}),
    lambda tokens: LossOutput(tokens.logprobs.sum(), {"a\\ud800": 1.0}),
    lambda tokens: LossOutput(tokens.logprobs.sum(), {}, {"mine": tokens.logprobs}),
    lambda tokens: LossOutput(tokens.logprobs.sum(), None),
]
"""
TOKENS = LossTokens(
    logprobs=torch.tensor([-1.0, -2.0], requires_grad=True),
    inference_logprobs=torch.tensor([-1.0, -2.5]),
    advantages=torch.tensor([1.0, -0.5]),
    sample_index=torch.tensor([0, 0]),
    entropies=torch.tensor([0.5, 1.5]),
)
TOTALS = BatchTotals(tokens=2, samples=1, max_new_tokens=8)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder on sys.path with a package of the user's own."""
    (tmp_path / "my_algorithms").mkdir()
    (tmp_path / "my_algorithms/mine.py").write_text(ALGORITHM)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    for name in [name for name in sys.modules if name.startswith("my_algorithms")]:
        monkeypatch.delitem(sys.modules, name)
    loss_function.cache_clear()
    estimator_named.cache_clear()


def test_a_loss_of_the_users_own_with_its_settings() -> None:
    config = AlgorithmConfig(loss="my_algorithms.mine:scaled", args={"scale": 0.5})
    output = policy_loss(TOKENS, TOTALS, config)
    assert output.loss.item() == pytest.approx(-0.5 * (-1.0 + 1.0) / 2)
    assert output.sums == {"my/figure": 2.0}
    (gradient,) = torch.autograd.grad(output.loss, TOKENS.logprobs)
    assert gradient.tolist() == [-0.25, 0.125]


def test_it_is_corrected_as_the_built_in_ones_are() -> None:
    config = AlgorithmConfig(
        loss="my_algorithms.mine:scaled",
        args={"scale": 1.0},
        importance_correction=ImportanceCorrection.truncated,
        importance_cap=1.2,
    )
    output = policy_loss(TOKENS, TOTALS, config)
    assert output.loss.item() == pytest.approx(-(1.0 * -1.0 + 1.2 * -0.5 * -2.0) / 2), "weights 1 and min(e^½, 1.2)"
    assert output.sums["my/figure"] == 2.0, "what it reports stays beside what is reported of the weights"
    assert float(output.sums["importance/weight_mean"]) == pytest.approx(1 + 1.2)


def test_an_advantage_of_the_users_own() -> None:
    turns = [turn(length) for length in (4, 2, 3)]
    group = Group(
        "p",
        [
            Rollout("r", "p", index, [turn], reward, {"bonus": 10.0 * index}, StopReason.TERMINATED)
            for index, (turn, reward) in enumerate(zip(turns, (0.1, 0.9, 0.2), strict=True))
        ],
    )
    assign_advantages(group, AlgorithmConfig(advantage="my_algorithms.mine:ranks", args={"scale": 2.0}))
    assert [turn.advantage for turn in turns] == [-2.0, 2.0, 0.0]
    assign_advantages(group, AlgorithmConfig(advantage="my_algorithms.mine:shorter"))
    assert [turn.advantage for turn in turns] == [-4.0, 8.0, 17.0], "it sees lengths and the task's metrics"


def turn(length: int) -> Turn:
    tokens = np.ones(length, np.int64)
    completion = Completion(tokens, np.full(length, -1.0, np.float32), 0 * tokens, "stop")
    return Turn(Prompt(np.array([1]), (), ()), completion, "", [], branch=0, reward=0.0)


def compared(*rewards: float) -> Comparison:
    """Whole episodes with these rewards."""
    siblings = [Rollout("r", "p", i, [turn(1)], each, {}, StopReason.TERMINATED) for i, each in enumerate(rewards)]
    (found,) = comparisons(siblings, AlgorithmConfig())
    return found


def test_built_in_names_need_no_import() -> None:
    assert estimator_named("group_centered")(compared(1, 0), AlgorithmConfig()).tolist() == [0.5, -0.5]


@pytest.mark.parametrize(
    ("key", "name", "message"),
    [
        ("loss", "my_algorithms.mine:two_arguments", r"cannot be called as two_arguments\(tokens, totals, config\)"),
        ("loss", "my_algorithms.mine:number", "is a int, not a loss function, .*: it has scaled, bare, two_arguments"),
        ("loss", "my_algorithms.mine:scald", "names 'scald', which my_algorithms.mine .* does not define"),
        ("loss", "my_algorithms.gone:scaled", "names a module that does not exist"),
        ("advantage", "my_algorithms.mine:scaled", r"cannot be called as scaled\(compared, config\)"),
        ("advantage", "my_algorithms.mine:of_rewards", r"cannot be called as of_rewards\(compared, config\)"),
    ],
)
def test_what_cannot_be_called_is_refused_before_anything_starts(
    key: str, name: str, message: str, run_config: Callable[..., RunConfig]
) -> None:
    config = run_config(f"algorithm.{key}={name}")
    with pytest.raises(ConfigError, match=f"^algorithm.{key}={name} {message}"):
        imports_resolve(config)


def test_what_a_function_returns_is_looked_at() -> None:
    with pytest.raises(ConfigError, match=r"of type Tensor, not a LossOutput, .*LossOutput\(loss\)"):
        policy_loss(TOKENS, TOTALS, AlgorithmConfig(loss="my_algorithms.mine:bare"))
    with pytest.raises(ConfigError, match=r"returned 0.5 for the rewards \[0.0, 1.0\], .*: return one finite"):
        estimator_named("my_algorithms.mine:one")(compared(0, 1), AlgorithmConfig())
    with np.errstate(divide="ignore"), pytest.raises(ConfigError, match=r"returned \[inf, inf\] for the rewards"):
        estimator_named("my_algorithms.mine:infinite")(compared(1, 1), AlgorithmConfig())


@pytest.mark.parametrize("case", range(10))
def test_whatever_an_advantage_does_is_an_error_that_names_it(case: int) -> None:
    given = compared(case, 1)
    with pytest.raises(ConfigError, match=r"^algorithm\.advantage=my_algorithms\.mine:badly.*: return one finite"):
        estimator_named("my_algorithms.mine:badly")(given, AlgorithmConfig())
    assert given.rewards.tolist() == [case, 1]


@pytest.mark.parametrize("case", range(14))
def test_whatever_a_loss_does_is_an_error_that_names_it(case: int) -> None:
    config = AlgorithmConfig(loss="my_algorithms.mine:lost", args={"case": case})
    with pytest.raises(ConfigError, match=r"^algorithm\.loss=my_algorithms\.mine:lost: .*: return vlmrl\.trainer"):
        policy_loss(TOKENS, TOTALS, config)


def test_a_module_that_ends_the_process_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script without a guard: its exit code 0 would say that the run was fine."""
    (tmp_path / "a_script.py").write_text("import sys\nsys.exit(0)\nclass Mine: ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"^task\.target=a_script:Mine: importing a_script:Mine raised SystemExit: 0"):
        import_named("task.target", "a_script:Mine", "Task class", callable)


# ── files ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_file_is_imported_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its absolute path: two files of one name are two modules, and what stands next to a file is found."""
    for name in ("one", "two"):
        folder = tmp_path / name / "my folder"
        folder.mkdir(parents=True)
        (folder / "rewards.py").write_text(f"from helper_of_{name} import VALUE\nclass Mine:\n    value = VALUE\n")
        (folder / f"helper_of_{name}.py").write_text(f"VALUE = {name!r}\n")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path / "one")
    one = import_named("task.target", "my folder/rewards.py:Mine", "Task class", callable)
    two = import_named("task.target", f"{tmp_path}/two/my folder/rewards.py:Mine", "Task class", callable)
    assert (one.value, two.value) == ("one", "two")
    monkeypatch.chdir("/")
    assert import_named("task.target", f"{tmp_path}/one/my folder/rewards.py:Mine", "Task class", callable) is one


def test_objects_of_a_file_are_pickled_for_another_process(tmp_path: Path) -> None:
    (tmp_path / "rewards.py").write_text("def half(x):\n    return x / 2\n")
    half = import_named("reward.terms.half.target", f"{tmp_path}/rewards.py:half", "reward function", callable)
    script = (
        "import pickle, sys, vlmrl.config.import_paths\nprint(pickle.loads(bytes.fromhex(sys.argv[1]))(7))"  # our own
    )
    ran = subprocess.run(
        [sys.executable, "-c", script, pickle.dumps(half).hex()], capture_output=True, text=True, check=True
    )
    assert ran.stdout == "3.5\n"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("none.py:fn", r"reward=none\.py:fn names the file /\S+/none\.py, which does not exist, .*: correct the path"),
        ("bad.py:fn", r"reward=bad\.py:fn: importing bad\.py:fn raised ZeroDivisionError"),
        ("good.py:other", r"names 'other', which good\.py does not define, .*: it has fn"),
        ("needs.py:fn", r"reward=needs\.py:fn does not import \(No module named 'no_such_module'\)"),
    ],
)
def test_a_file_that_cannot_be_used(path: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bad.py").write_text("1 / 0\n")
    (tmp_path / "good.py").write_text("def fn():\n    pass\n")
    (tmp_path / "needs.py").write_text("import no_such_module\n")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        import_named("reward", path, "reward function", callable)
