"""evaluation.json: what one evaluation asked and what it found, per set and per problem. mode=eval writes it.

    {"model": "…", "step": 20, "sets": [{
        "name": "ood", "settings": {"samples": 8, "temperature": 1.0, …}, "pass_at": 1.0,
        "scores": {"reward": {"value": 0.41, "se": 0.03, "problems": 128}, "pass@8": …},
        "by": {"subject": {"algebra": {"reward": …}}},
        "problems": [{"id": "test.parquet:3:9f31c2aa", "rewards": [1.0, 0.0, …], "greedy": 1.0, …}, …]}]}

`evaluation_of` also reads a run that was evaluated while it trained: its newest evaluation, from the recorded rollouts.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
from omegaconf import OmegaConf

from vlmrl.errors import VlmrlError
from vlmrl.record.files import disk_errors, open_regular, write_bytes_atomically
from vlmrl.record.rollouts import RolloutRecord, read_rollouts
from vlmrl.record.run_dir import RunDir
from vlmrl.record.splits import is_greedy, set_of

log = logging.getLogger(__name__)

EVALUATION = "evaluation.json"
"""The name of the file."""

MAIN = "main"
"""The name of the main evaluation in the file; no set may have it."""


@dataclass(frozen=True)
class Asked:
    """One problem of an evaluation set, and the answers to it."""

    problem_id: str
    rewards: tuple[float, ...]
    """Of the sampled answers; a fault counts as 0.0."""
    answers: tuple[str | None, ...] = ()
    """The sampled answers as they vote; None where there is none. As long as `rewards`, or empty where unknown."""
    greedy: float | None = None
    """Reward of the greedy answer; None where there is none."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Values of the columns by which results are shown."""


@dataclass(frozen=True)
class Mean:
    """A mean over problems and its standard error."""

    value: float
    se: float | None
    """None where there is a single problem."""
    problems: int


@dataclass(frozen=True)
class SetResult:
    """One set of an evaluation."""

    name: str
    """`MAIN` for the main evaluation."""
    pass_at: float
    """Reward from which an answer has passed."""
    asked: tuple[Asked, ...]
    scores: Mapping[str, Mean] = field(default_factory=dict)
    """Score → value (`vlmrl.orchestrator.eval_scores.scores`); empty where it was read from rollouts."""
    by: Mapping[str, Mapping[str, Mapping[str, Mean]]] = field(default_factory=dict)
    """Column → value → scores."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """How the set was played."""


@dataclass(frozen=True)
class Evaluation:
    """An evaluation of one policy."""

    model: str
    step: int
    """Optimizer steps that the weights contain."""
    sets: tuple[SetResult, ...]


def write_evaluation(path: Path, evaluation: Evaluation) -> None:
    """Write evaluation.json. Raises VlmrlError."""
    content = {
        "model": evaluation.model,
        "step": evaluation.step,
        "sets": [_set_tree(each) for each in evaluation.sets],
    }
    with disk_errors(path):
        write_bytes_atomically(path, orjson.dumps(content, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))


def _set_tree(result: SetResult) -> dict[str, Any]:
    return {
        "name": result.name,
        "settings": dict(result.settings),
        "pass_at": result.pass_at,
        "scores": dict(result.scores),
        "by": {column: {value: dict(means) for value, means in values.items()} for column, values in result.by.items()},
        "problems": [
            {
                "id": asked.problem_id,
                "rewards": asked.rewards,
                "answers": asked.answers,
                "greedy": asked.greedy,
                "columns": dict(asked.columns),
            }
            for asked in result.asked
        ],
    }


def evaluation_of(run_dir: RunDir) -> Evaluation | None:
    """The evaluation of a run of mode=eval, of the last mode=eval of a run's checkpoint (in eval/), or the newest one
    that a run made while it trained. None where there is none. Raises VlmrlError where a file is damaged."""
    for folder in (run_dir.path, run_dir.path / "eval"):
        if (folder / EVALUATION).exists():
            return read_evaluation(folder / EVALUATION)
    steps = run_dir.rollouts_steps("eval")
    if not steps:
        return None
    config = run_dir.read_config(key="runs")
    sets: Any = OmegaConf.select(config, "orchestrator.eval.sets") or {}
    pass_at = {str(name): float(sets[name].get("pass_at", 1.0)) for name in sets}
    records = read_rollouts(run_dir.recorded_rollouts("eval", steps[-1]), damaged=log.warning)
    return Evaluation(str(OmegaConf.select(config, "model.name")), steps[-1], from_rollouts(records, pass_at))


def read_evaluation(path: Path) -> Evaluation:
    """Read evaluation.json. Raises VlmrlError where it is not such a file."""
    try:
        with open_regular(path) as file:
            content = orjson.loads(file.read())
        sets = tuple(_read_set(each) for each in content["sets"])
        return Evaluation(str(content["model"]), int(content["step"]), sets)
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise VlmrlError(
            f"{path} is no evaluation that mode=eval wrote ({type(error).__name__}: {error}), so it cannot be "
            "compared: evaluate again"
        ) from error


def _read_set(tree: Mapping[str, Any]) -> SetResult:
    asked = tuple(
        Asked(
            str(each["id"]),
            tuple(float(reward) for reward in each["rewards"]),
            tuple(each["answers"]),
            None if each["greedy"] is None else float(each["greedy"]),
            {str(column): str(value) for column, value in each["columns"].items()},
        )
        for each in tree["problems"]
    )
    by = {
        column: {value: _read_means(means) for value, means in values.items()} for column, values in tree["by"].items()
    }
    return SetResult(
        str(tree["name"]), float(tree["pass_at"]), asked, _read_means(tree["scores"]), by, dict(tree["settings"])
    )


def _read_means(tree: Mapping[str, Any]) -> dict[str, Mean]:
    return {name: Mean(mean["value"], mean["se"], mean["problems"]) for name, mean in tree.items()}


def from_rollouts(records: Iterable[RolloutRecord], pass_at: Mapping[str, float]) -> tuple[SetResult, ...]:
    """The sets of an evaluation whose rollouts were recorded. `pass_at` has that of each named set."""
    sampled: dict[str, dict[str, list[float]]] = {}
    greedy: dict[str, dict[str, float]] = {}
    ids: dict[tuple[str, str], str] = {}
    for record in records:
        name = set_of(record["split"])
        if name is None or record["dropped"] == "no_reward":
            continue
        group = record["rollout_id"].split("/")[-2]
        ids[name, group] = record["problem_id"]
        if is_greedy(record["split"]):
            greedy.setdefault(name, {})[group] = record["reward"]
        else:
            sampled.setdefault(name, {}).setdefault(group, []).append(record["reward"])
    results = []
    for name in dict.fromkeys(name for name, _ in ids):
        groups: Sequence[str] = [group for of_set, group in ids if of_set == name]
        asked = tuple(
            Asked(
                ids[name, group],
                tuple(sampled.get(name, {}).get(group, ())),
                greedy=greedy.get(name, {}).get(group),
            )
            for group in groups
        )
        results.append(SetResult(name or MAIN, pass_at.get(name, 1.0), asked))
    return tuple(results)
