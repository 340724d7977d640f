"""`task=verifiers`: the tasks of an environment of the `verifiers` package, API v1.

    config ─▶ verifiers_worker.py, once ─▶ the key of each task ─▶ VerifiersProblem: its position

The environment is loaded in a process of its own (`task.python`), never in the run. Episodes are played by another such
process (vlmrl/orchestrator/programs/episodes.py).
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import orjson

from vlmrl.config.verifiers import VerifiersConfig
from vlmrl.errors import ConfigError, safe_text
from vlmrl.tasks.base import NotInSplit, Split, Task
from vlmrl.tasks.dataset.order import shuffled
from vlmrl.tasks.programs.problems import PlayedOutside
from vlmrl.types import Message

START_TIMEOUT_S = 600.0
"""Seconds for an environment to load its tasks, which it may download."""

SHOWN_LINES = 5
"""Last lines of an error output that a message quotes."""


@dataclass(frozen=True)
class VerifiersProblem(PlayedOutside):
    """One task of the environment."""

    id: str
    payload: Mapping[str, Any]


class VerifiersTask(Task):
    """The tasks of an environment. Raises `ConfigError` where it cannot be loaded."""

    def __init__(self, config: VerifiersConfig, *, seed: int) -> None:
        self._config = config
        self._seed = seed
        self._keys = task_keys(config)

    def problem(self, split: Split, index: int) -> VerifiersProblem:
        if self._keys is None:
            position, key = index, f"{self._config.env}/{index}"
        else:
            count = len(self._keys)
            position = shuffled(index, count, self._seed) if split == "train" else index % count
            key = self._keys[position]
        digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
        is_held_out = int.from_bytes(digest, "big") % self._config.holdout_one_in == 0
        if is_held_out != (split == "eval"):
            raise NotInSplit(f"the task belongs to the {'evaluation' if is_held_out else 'training'} split")
        return VerifiersProblem(f"{self._config.env} {position} {digest.hex()[:8]}", {"task": position})

    def num_rows(self, split: Split) -> int | None:
        return None if self._keys is None else len(self._keys)

    def env(self, problem: Any) -> NoReturn:
        raise NotImplementedError("the episodes of task=verifiers are played by the environment's own agents")

    def demonstration(self, problem: Any, *, random_answers: bool, seed: int) -> tuple[Message, ...]:
        raise NotImplementedError("task=verifiers has no demonstrations: set trainer.warmup.steps=0")

    def texts(self) -> tuple[str, ...]:
        if not self._config.texts:
            raise NotImplementedError("task.texts is empty")
        return tuple(self._config.texts)

    def data_table(self) -> dict[str, str]:
        """How many tasks there are."""
        if self._keys is None:
            return {"tasks": f"endless, of {self._config.env}; 1 in {self._config.holdout_one_in} is held out"}
        return {"tasks": f"{len(self._keys):,} of {self._config.env}; 1 in {self._config.holdout_one_in} is held out"}


def worker_command(config: VerifiersConfig) -> list[str]:
    """The command of a worker. The program is given as text, so that Python looks for packages in the folder from which
    the run was started, and not next to the program."""
    source = Path(__file__).with_name("verifiers_worker.py").read_text(encoding="utf-8")
    return [config.python or sys.executable, "-u", "-c", source]


def first_line(config: VerifiersConfig, *, keys: bool = False) -> bytes:
    """The first line that a worker reads: the environment's config, and whether it is to tell the keys of all tasks."""
    args = dict(config.args)
    taskset = {**dict(args.get("taskset") or {}), "id": config.env}
    return orjson.dumps({"config": {**args, "taskset": taskset}, "keys": keys}, default=dict) + b"\n"


def task_keys(config: VerifiersConfig) -> list[str] | None:
    """The key of each task of the environment; None where there is no end of them. Raises ConfigError."""
    command = worker_command(config)
    try:
        ended = subprocess.run(
            command,
            input=first_line(config, keys=True),
            capture_output=True,
            timeout=START_TIMEOUT_S,
        )
    except OSError as error:
        raise ConfigError(
            f"task.python={config.python} cannot be started ({error.strerror}), so no environment can be loaded: give "
            "the path of the virtual environment's bin/python"
        ) from None
    except subprocess.TimeoutExpired:
        raise ConfigError(
            f"task.env={config.env} was not loaded within {START_TIMEOUT_S:g} s, so its tasks are not known: choose "
            "another, or start its download by hand"
        ) from None
    return keys_in(config, ended.stdout.splitlines(), ended.stderr)


def keys_in(config: VerifiersConfig, lines: Sequence[bytes], errors: bytes) -> list[str] | None:
    """The keys in the first line of a worker's answer. Raises ConfigError."""
    answer: dict[str, Any] = {}
    if lines:
        answer = orjson.loads(lines[0])
    if not answer.get("ready"):
        last = "\n".join(errors.decode(errors="replace").splitlines()[-SHOWN_LINES:])
        why = safe_text(answer.get("failed") or last)
        where = f" in task.python={config.python}" if config.python is not None else ""
        raise ConfigError(
            f"task.env={config.env} cannot be loaded{where} ({why}), so there is nothing to play: correct it, or "
            "install verifiers==0.4.0 and the environment's package there"
        )
    keys = answer["keys"]
    return None if keys is None else [str(key) for key in keys]
