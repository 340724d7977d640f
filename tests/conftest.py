"""Fixtures for every test."""

from __future__ import annotations

import os

# Threads of one operation wait for each other in a loop, so beside other processes they are slower than one thread.
# OpenMP reads the variable when torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import copy
import logging
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from omegaconf import DictConfig

from support.composing import compose_as_hydra
from vlmrl.cli.recipe import with_recipe
from vlmrl.config.parse import parse
from vlmrl.config.run import RunConfig
from vlmrl.models import broken_wheels

# Before any test module imports transformers, which looks once for the packages that it works around.
broken_wheels.install()

# A shell without job control starts what runs in its background with SIGINT and SIGQUIT ignored, and nohup with SIGHUP.
# A run leaves signals alone that its starter ignores, so the tests of signals would wait for ever.
for number, handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGQUIT, signal.SIG_DFL),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

# A shared machine may be slow at any moment. The examples are the same in every run, so that a change is judged by what
# it does; `pytest --hypothesis-profile=default` looks for new ones.
hypothesis.settings.register_profile("vlmrl", deadline=None, derandomize=True)
hypothesis.settings.load_profile("vlmrl")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One process per processor; none beside this one where all arguments are single files, which a new process would
    only make slower."""
    named = config.option.file_or_dir
    return 0 if named and all(".py" in each for each in named) else len(os.sched_getaffinity(0))


@pytest.fixture(autouse=True)
def root_handlers() -> Iterator[None]:
    """Remove the log handlers that a test has left: Hydra's write to the stream that was stdout in that test."""
    before = list(logging.root.handlers)
    yield
    for handler in logging.root.handlers[:]:
        if handler not in before:
            logging.root.removeHandler(handler)


@pytest.fixture
def composed() -> Callable[..., DictConfig]:
    """`composed("model=qwen3vl", "seed=1")`: the config that the command line composes, with `output_dir`."""

    def compose_config(*overrides: str) -> DictConfig:
        config = compose_as_hydra(*with_recipe(list(overrides)))
        config.output_dir = "outputs/test"
        return config

    return compose_config


@pytest.fixture
def run_config(composed: Callable[..., DictConfig]) -> Callable[..., RunConfig]:
    """`run_config("trainer.max_steps=2")`: the config of a run, typed and not checked (`support.configs.checked`)."""
    return lambda *overrides: parse(composed(*overrides))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint folder of the tiny model of tests/support/helpers.py."""
    from support import helpers
    from vlmrl.models.checkpoints.load import resolve_checkpoint

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLMRL_CACHE", str(tmp_path_factory.mktemp("tiny-model")))
        return resolve_checkpoint(helpers.TINY, ("a",))


@pytest.fixture(scope="session")
def loaded_tiny_model(tiny_folder: Path) -> Any:
    """Its model, for `tiny_model` to copy."""
    from support import helpers
    from vlmrl.models.checkpoints.load import load_model

    model = load_model(tiny_folder, helpers.TINY)
    assert model.config.image_token_id == helpers.IMAGE_PAD
    return model


@pytest.fixture
def tiny_model(loaded_tiny_model: Any) -> Callable[[], Any]:
    """`tiny_model()`: a fresh copy of a real, tiny Qwen3-VL (tests/support/helpers.py), always the same weights."""
    return lambda: copy.deepcopy(loaded_tiny_model)


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`family_folder("gemma3")`: the folder of that family's tiny checkpoint (tests/support/families), not to be
    changed."""
    from support.families import build

    parent = tmp_path_factory.mktemp("families")

    def folder(name: str) -> Path:
        made = parent / name
        return made if made.exists() else build(name, made)

    return folder


@pytest.fixture
def in_task(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`in_task(1, tasks=3)`: this process is task 1 of 3 in a Slurm step. `serving` of them run servers; None: not
    divided yet."""

    from support import slurm_tasks
    from vlmrl.ranks import slurm

    def enter(task: int, tasks: int = 3, serving: int | None = None, **more: str) -> None:
        monkeypatch.setattr(slurm, "_serving", serving)
        for name, value in slurm_tasks.step(task, tasks, **more).items():
            monkeypatch.setenv(name, value)

    return enter
