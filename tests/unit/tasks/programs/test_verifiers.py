"""What the run hands to a worker of verifiers, and what it reads of its answer. Whole episodes: test_episodes.py."""

from __future__ import annotations

import sys

import orjson
import pytest

from vlmrl.config.verifiers import VerifiersConfig
from vlmrl.errors import ConfigError
from vlmrl.tasks.programs import verifiers
from vlmrl.tasks.programs.verifiers import first_line, keys_in, task_keys, worker_command


def test_the_config_is_verifiers_own_with_the_taskset() -> None:
    config = VerifiersConfig(env="mine", args={"agent": {"max_turns": 3}, "taskset": {"level": 2}})
    assert orjson.loads(first_line(config, keys=True)) == {
        "config": {"agent": {"max_turns": 3}, "taskset": {"level": 2, "id": "mine"}},
        "keys": True,
    }
    assert orjson.loads(first_line(VerifiersConfig(env="mine"))) == {
        "config": {"taskset": {"id": "mine"}},
        "keys": False,
    }


def test_the_worker_is_started_by_the_python_of_its_own_environment() -> None:
    assert worker_command(VerifiersConfig(env="mine"))[:2] == [sys.executable, "-u"]
    assert worker_command(VerifiersConfig(env="mine", python="/venv/bin/python"))[0] == "/venv/bin/python"


@pytest.mark.parametrize(
    ("lines", "errors", "message"),
    [
        (
            [b'{"failed": "ModuleNotFoundError: mine"}'],
            b"",
            r"task.env=mine cannot be loaded \(ModuleNotFoundError: mine",
        ),
        (
            [],
            b"Traceback\nModuleNotFoundError: No module named 'verifiers'",
            "No module named 'verifiers'.*install verif",
        ),
    ],
)
def test_what_cannot_be_loaded_is_refused_in_words(lines: list[bytes], errors: bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        keys_in(VerifiersConfig(env="mine"), lines, errors)


def test_keys_may_have_no_end() -> None:
    config = VerifiersConfig(env="mine")
    assert keys_in(config, [b'{"ready": true, "keys": ["a", "b"]}'], b"") == ["a", "b"]
    assert keys_in(config, [b'{"ready": true, "keys": null}'], b"") is None


def test_a_python_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"task.python=/no/python cannot be started \(No such file"):
        task_keys(VerifiersConfig(env="mine", python="/no/python"))


def test_a_worker_without_verifiers_says_so() -> None:
    """The real worker, in a Python without packages."""
    config = VerifiersConfig(env="mine", python=sys.executable)
    source = worker_command(config)[-1]
    assert "import verifiers.v1" in source
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verifiers, "worker_command", lambda config: [sys.executable, "-I", "-S", "-c", source])
        with pytest.raises(ConfigError, match="No module named 'verifiers'"):
            task_keys(config)
