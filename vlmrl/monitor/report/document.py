"""Read run directories into the document that the page shows: plain JSON.

    {"generated": "2026-03-01 12:00", "defaults": {key: value},
     "images": {hash: {"src": "data:image/png;base64,…", "width": 32, "height": 32, "whole": true}},
     "videos": {hash: {"frames": [hash, …], "times": [seconds, …], "fps": 2.0, "tensors", "shown": [index, …]}},
     "runs": [{"name", "path", "state", "summary", "environment", "config": {key: value}, "doctor",
               "metrics": {key: [value per line or null]}, "supervised": …,
               "sets": [{"name", "scores": {score: key}, "by": [[column, [[value, key], …]], …]}],
               "bad_rows": {"count", "reasons", "shown": [{"reason", "count", "rows": [[place, step, phase], …]}]},
               "spellings": {token id: text}, "messages": [[message, …], …],
               "prompts": [{"at", "count", "placeholders": [[offset, length, hash, gaps], …]}],
               "prompt_ids": base64 int32 [Σ count],
               "tokens": {"ids", "versions": base64 int32 [C], "engine", "trainer", "entropy": base64 float32 [C]},
               "rollouts": [{"id", …, "turns": [{"at", "count", "prompt", "offset", "messages", …}]}],
               "recorded": {"steps": files, "evaluations": files, "rollouts": rollouts in them, "shown": …,
                            "deleted": sentence or null}}]}

`tokens` holds all completions one after the other (C tokens in total); a turn's completion is `count` tokens from `at`
on. Values that only trained tokens have are NaN elsewhere. Prompts are stored as in rollouts/ (from `offset` on), each
distinct one once, so that siblings share it. Numbers are exact: float32 bytes and Python's shortest decimals.

Left out on purpose: environment variables (no file that is read here has them), and secrets in the config
(vlmrl/config/secrets.py).
"""

from __future__ import annotations

import base64
import logging
import math
import re
import sys
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import orjson
from omegaconf.errors import OmegaConfBaseException

from vlmrl.config.parse import literal
from vlmrl.config.secrets import redacted
from vlmrl.errors import ConfigError
from vlmrl.monitor.report.bad_rows import bad_rows
from vlmrl.monitor.report.choice import Choice, Shape, choose, evaluation_rollouts, evaluation_sizes
from vlmrl.monitor.report.named_sets import named_sets
from vlmrl.monitor.report.pictures import Pictures
from vlmrl.monitor.report.videos import frames_of, shown
from vlmrl.record.disk_bound import read_deleted
from vlmrl.record.metrics import Record, read_metrics
from vlmrl.record.rollouts import RolloutRecord, TurnRecord, read_rollouts
from vlmrl.record.run_dir import RunDir
from vlmrl.record.tokens import read_spellings

log = logging.getLogger(__name__)

GROUP = re.compile(r"[^/]+/[^/]+/([0-9]{1,9})/[^/]+")
"""A rollout id."""

INT32: tuple[Literal["prompt_token_ids", "completion_ids", "versions"], ...]
INT32 = ("prompt_token_ids", "completion_ids", "versions")
"""Keys of a turn whose numbers the page stores as int32."""

MAX_ROLLOUTS = 2000
"""Most rollouts of a page, over all its runs. Fewer if they are long or have many large images."""
MAX_TOKENS = 1_500_000
"""Most tokens of a page; a shared prompt counts once."""
MAX_IMAGE_BYTES = 24 * 2**20
"""Most bytes of encoded images on a page."""


@dataclass(eq=False)
class Rollouts:
    """Collects the rollouts of one run, with shared prompts and messages stored once."""

    rollouts: list[dict[str, Any]] = field(default_factory=list)
    messages: dict[bytes, int] = field(default_factory=dict)
    prompts: dict[bytes, int] = field(default_factory=dict)
    prompt_places: list[dict[str, Any]] = field(default_factory=list)
    prompt_ids: array[int] = field(default_factory=lambda: array("i"))
    ids: array[int] = field(default_factory=lambda: array("i"))
    versions: array[int] = field(default_factory=lambda: array("i"))
    engine: array[float] = field(default_factory=lambda: array("f"))
    trainer: array[float] = field(default_factory=lambda: array("f"))
    entropy: array[float] = field(default_factory=lambda: array("f"))
    hashes: dict[str, None] = field(default_factory=dict)
    videos: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """Tokens of all completions and distinct prompts."""
        return len(self.ids) + len(self.prompt_ids)

    def add(self, record: RolloutRecord) -> None:
        """Add a recorded rollout."""
        label, step, group, _ = record["rollout_id"].split("/")  # `read_groups` leaves out other ids
        self.videos |= shown(record["videos"])
        self.rollouts.append(
            {
                "id": record["rollout_id"],
                "group": f"{label.removesuffix('-greedy')}/{step}/{group}",
                "problem": record["problem_id"],
                "step": record["step"],
                "split": record["split"],
                "task": record["task"],
                "index": record["index"],
                "reward": record["reward"],
                "rewards": record["rewards"],
                "reference": record["reference"],
                "metrics": record["metrics"],
                "stop": record["stop_reason"],
                "dropped": record["dropped"],
                "filtered": record.get("filtered", []),
                "error": record["error"],
                "stdout": record.get("stdout"),
                "stderr": record.get("stderr"),
                "seconds": record["seconds"],
                "turns": [self._turn(turn, record) for turn in record["turns"]],
            }
        )

    def _turn(self, turn: TurnRecord, record: RolloutRecord) -> dict[str, Any]:
        at, count = len(self.ids), len(turn["completion_ids"])
        nothing = [math.nan] * count
        trainer = turn.get("trainer_logprobs")
        self.ids.extend(turn["completion_ids"])
        self.versions.extend(turn["versions"])
        self.engine.extend(turn["logprobs"])
        self.trainer.extend(trainer or nothing)
        self.entropy.extend(turn.get("entropies") or nothing)
        return {
            "at": at,
            "count": count,
            "prompt": self._prompt(turn),
            "offset": turn["prompt_offset"],
            "messages": self.messages.setdefault(orjson.dumps(turn["messages"]), len(self.messages)),
            "branch": turn["branch"],
            "starts_over": turn["starts_over"],
            "finish": turn["finish_reason"],
            "stop": turn.get("stop"),
            "sampling": turn.get("sampling"),
            "text": turn["text"],
            "reward": turn["reward"],
            "advantage": turn["advantage"],
            # Old records have no trainer_logprobs. There, every training rollout that was not dropped was trained on.
            "learned": trainer is not None
            or (record["split"] == "train" and record["dropped"] is None and min(turn["versions"], default=0) >= 0),
        }

    def _prompt(self, turn: TurnRecord) -> int:
        offset = turn["prompt_offset"]
        ids = array("i", turn["prompt_token_ids"][offset:])
        placeholders = [place for place in turn["placeholders"] if place[0] >= offset]
        self.hashes |= dict.fromkeys(hash for _, _, hash, _ in placeholders)
        key = orjson.dumps([offset, placeholders]) + ids.tobytes()
        if key not in self.prompts:
            self.prompts[key] = len(self.prompts)
            self.prompt_places.append(
                {"at": len(self.prompt_ids), "count": len(ids), "offset": offset, "placeholders": placeholders}
            )
            self.prompt_ids.extend(ids)
        return self.prompts[key]

    def document(self) -> dict[str, Any]:
        """The rollouts' part of a run's document."""
        return {
            "rollouts": self.rollouts,
            "messages": [orjson.Fragment(messages) for messages in self.messages],
            "prompts": self.prompt_places,
            "prompt_ids": packed(self.prompt_ids),
            "tokens": {
                "ids": packed(self.ids),
                "versions": packed(self.versions),
                "engine": packed(self.engine),
                "trainer": packed(self.trainer),
                "entropy": packed(self.entropy),
            },
        }


def packed(values: array[Any]) -> str:
    """Base64 of 4-byte numbers, little-endian.

    >>> packed(array("i", [1, 2]))
    'AQAAAAIAAAA='
    """
    assert values.itemsize == 4
    if sys.byteorder == "big":
        values.byteswap()
    return base64.b64encode(values.tobytes()).decode()


def read_groups(choice: Choice) -> Iterator[RolloutRecord]:
    """Read the chosen rollouts, file by file. A file that a resumed run has deleted in the meantime is skipped, and so
    is a damaged line, with a warning."""
    for path in choice.paths:
        numbers = set(choice.groups.get(path, ()))
        with suppress(FileNotFoundError):
            if path in choice.dropped:
                numbers |= _groups_with(path, choice.dropped[path])
            yield from _readable_rollouts(path, _of_groups(numbers))


def _groups_with(path: Path, reasons: Set[str]) -> set[int]:
    """For each drop reason, the number of the first group of a file that has such a rollout. The file is read once."""
    found: dict[str, int] = {}
    for record in _readable_rollouts(path):
        if record["dropped"] is not None and record["dropped"] in reasons:
            found.setdefault(record["dropped"], _group(record["rollout_id"]))
            if len(found) == len(reasons):
                break
    return set(found.values())


def _readable_rollouts(path: Path, wanted: Callable[[str], bool] = lambda rollout_id: True) -> Iterator[RolloutRecord]:
    """The rollouts of a file whose ids have the usual form and whose numbers fit into the page's arrays."""
    for record in read_rollouts(path, wanted, log.warning):
        numbers = (turn[key] for turn in record["turns"] for key in INT32)
        if _group(record["rollout_id"]) >= 0 and max((max(each, default=0) for each in numbers), default=0) < 2**31:
            yield record


def _of_groups(numbers: set[int]) -> Callable[[str], bool]:
    return lambda rollout_id: _group(rollout_id) in numbers


def _group(rollout_id: str) -> int:
    """The number of the group in `train/000012/03/001`; -1 for an id of another form."""
    found = GROUP.fullmatch(rollout_id)
    return int(found[1]) if found else -1


# ── a run ───────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(eq=False)
class ReportedRun:
    """One run directory, read except for its rollouts."""

    name: str
    run_dir: RunDir
    config: dict[str, Any]
    environment: dict[str, Any]
    shape: Shape
    metrics: list[Record]
    steps: list[int]
    """Steps with recorded training rollouts."""
    evaluations: list[int]
    """Steps with recorded evaluation rollouts."""

    @staticmethod
    def read(name: str, run_dir: RunDir) -> ReportedRun:
        """Read a run. Raises ConfigError where the folder holds no run, VlmrlError where a file is damaged."""
        try:
            config = flat(redacted(literal(run_dir.read_config_and_environment())))
            shape = Shape.of(config)
        except (OmegaConfBaseException, AttributeError, KeyError, ValueError, TypeError, RecursionError) as error:
            raise ConfigError(
                f"run={run_dir.path} holds no config.yaml of a run ({error}), so there is nothing to show: name the "
                "folder of a run, for example outputs/latest"
            ) from error
        prefix = "environment."
        return ReportedRun(
            name=name,
            run_dir=run_dir,
            config={key: value for key, value in config.items() if not key.startswith(prefix)},
            environment={key.removeprefix(prefix): value for key, value in config.items() if key.startswith(prefix)},
            shape=shape,
            metrics=read_metrics(run_dir.metrics) if run_dir.metrics.exists() else [],
            steps=run_dir.rollouts_steps("step"),
            evaluations=run_dir.rollouts_steps("eval"),
        )

    def document(self, rollouts: Rollouts) -> dict[str, Any]:
        """The document of this run with `rollouts`."""
        run_dir, summary = self.run_dir, self.run_dir.read_summary()
        newest = max((path.stat().st_mtime for path in (run_dir.metrics, run_dir.config) if path.exists()), default=0.0)
        shown = set(rollouts.ids).union(rollouts.prompt_ids)
        spellings = read_spellings(run_dir.tokens) if run_dir.tokens.exists() else {}
        return {
            "name": self.name,
            "path": str(run_dir.path),
            "state": summary["exit_reason"] if summary else None,
            "updated": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(newest)),
            "summary": summary,
            "environment": self.environment,
            "config": self.config,
            "doctor": run_dir.read_doctor(),
            "metrics": (metrics := columns(self.metrics)),
            "sets": named_sets(metrics),
            "bad_rows": bad_rows(run_dir.bad_rows),
            "supervised": columns(read_metrics(run_dir.supervised) if run_dir.supervised.exists() else []),
            "spellings": {str(id): text for id, text in spellings.items() if id in shown},
            "recorded": {
                "steps": len(self.steps),
                "evaluations": len(self.evaluations),
                "rollouts": self._recorded(),
                "shown": len(rollouts.rollouts),
                "deleted": None if (deleted := read_deleted(run_dir)) is None else deleted.says(),
            },
            **rollouts.document(),
        }

    def _recorded(self) -> int:
        """Rollouts in rollouts/, by the metrics of their steps; those of the config where a step has no metrics."""
        by_step, sizes = {record["step"]: record for record in self.metrics}, evaluation_sizes(self.config)
        trained = (by_step.get(step, {}).get("rollouts/total") or self.shape.step for step in self.steps)
        evaluated = (evaluation_rollouts(by_step.get(step, {}), sizes) for step in self.evaluations)
        return round(sum(trained) + sum(evaluated))


def columns(records: Sequence[Record]) -> dict[str, list[Any]]:
    """Turn lines into one list per key, with None where a line lacks the key.

    >>> columns([{"step": 0, "eval/reward": 0.5}, {"step": 1, "loss": 2.0}])
    {'step': [0, 1], 'eval/reward': [0.5, None], 'loss': [None, 2.0]}
    """
    keys = dict.fromkeys(key for record in records for key in record)
    return {key: [record.get(key) for record in records] for key in keys}


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten a tree of mappings to dotted keys.

    >>> flat({"task": {"target": "m:T", "args": {"level": 3}}})
    {'task.target': 'm:T', 'task.args.level': 3}
    """
    found: dict[str, Any] = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{key}.")
        else:
            found[key] = value
    return found


# ── a page ──────────────────────────────────────────────────────────────────────────────────────────────────


def document(named: Mapping[str, RunDir], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The document of a page about one or several runs, by their display names. `defaults`: the default config as a
    tree. Raises ConfigError and VlmrlError (see `ReportedRun.read`), OSError.
    """
    runs = [ReportedRun.read(name, run_dir) for name, run_dir in named.items()]
    pictures = Pictures()
    wanted = MAX_ROLLOUTS
    while True:
        gathered = [_gather(run, runs, wanted // len(runs)) for run in runs]
        images: dict[str, dict[str, Any]] = {}
        for run, rollouts in zip(runs, gathered, strict=True):
            images |= pictures.of(run.run_dir, [*rollouts.hashes, *frames_of(rollouts.videos)])
        tokens = sum(rollouts.num_tokens for rollouts in gathered)
        size = sum(len(image["src"]) for image in images.values())
        if (tokens <= MAX_TOKENS and size <= MAX_IMAGE_BYTES) or wanted < 2 * len(runs):
            break
        wanted //= 2
    return {
        "generated": time.strftime("%Y-%m-%d %H:%M:%S"),
        "defaults": flat(defaults),
        "images": images,
        "videos": {hash: video for rollouts in gathered for hash, video in rollouts.videos.items()},
        "runs": [run.document(rollouts) for run, rollouts in zip(runs, gathered, strict=True)],
    }


def _gather(run: ReportedRun, runs: Sequence[ReportedRun], wanted: int) -> Rollouts:
    """Read about `wanted` rollouts of `run`, from steps, groups and held-out problems that all runs have, so that the
    page can show rollouts of the same problem side by side."""
    shapes = [other.shape for other in runs]
    steps, evaluations = _common(runs) or (run.steps, run.evaluations)
    choice = choose(
        run.run_dir,
        Shape(
            groups_per_step=min(shape.groups_per_step for shape in shapes),
            group_size=max(shape.group_size for shape in shapes),
            problems=min(shape.problems for shape in shapes),
            answers=max(shape.answers for shape in shapes),
        ),
        wanted,
        steps,
        evaluations,
        run.metrics,
    )
    rollouts = Rollouts()
    for record in read_groups(choice):
        rollouts.add(record)
    return rollouts


def _common(runs: Sequence[ReportedRun]) -> tuple[list[int], list[int]] | None:
    """Steps and evaluations that all runs have; None where they have none in common."""
    steps, evaluations = (
        sorted(set.intersection(*map(set, each)))
        for each in ([run.steps for run in runs], [run.evaluations for run in runs])
    )
    return (steps, evaluations) if steps or evaluations else None
