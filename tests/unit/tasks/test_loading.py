"""Loading `task.target` from a user's folder, and the message for each way to write it wrong."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from vlmrl.config.task import ColorCodewordConfig, ImportedTaskConfig, TaskConfig
from vlmrl.errors import ConfigError
from vlmrl.tasks.color_codeword import ColorCodeword
from vlmrl.tasks.loading import load_task

COUNTING = '''
import random
from dataclasses import dataclass
from vlmrl import Image, Message, Reply, Task
import PIL.Image

@dataclass
class Dots:
    id: str
    count: int

class DotsEnv:
    def __init__(self, count):
        self.count = count

    def reset(self):
        return (Message.of("user", "How many?", Image(PIL.Image.new("L", (8 * self.count, 8)))),)

    def step(self, completion):
        right = float(completion == str(self.count))
        return Reply(turn_reward=right, done=True, reward=right)

class Counting(Task):
    def __init__(self, config, *, seed):
        self.level, self.seed = config.args["level"], seed

    def problem(self, split, index):
        count = random.Random(f"{self.seed} {split} {index}").randrange(self.level) * 2 + (1 if split == "eval" else 2)
        return Dots(f"{split} {count}", count)

    def env(self, problem):
        return DotsEnv(problem.count)

    def texts(self):
        return ("How many?",)

class Structural:
    """A class with the methods of Task that does not derive from it."""
    def __init__(self, config, *, seed): ...
    def problem(self, split, index): return Dots("1", 1)
    def env(self, problem): return DotsEnv(1)
    def demonstration(self, problem, *, random_answers, seed): return ()
    def texts(self): return ()

class NoEnv(Task):
    def problem(self, split, index): return Dots("1", 1)
    def texts(self): return ()

class NoSeed(Counting):
    def __init__(self, config): ...

class Picky(Counting):
    def __init__(self, config, *, seed):
        from vlmrl.errors import ConfigError
        raise ConfigError("task.args.level=0 asks for no dots: set it to 1 or more")

def make_task(config, *, seed): return Counting(config, seed=seed)
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on sys.path with a package of the user's own."""
    package = tmp_path / "my_package_of_tasks"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "counting.py").write_text(COUNTING)
    (package / "needy.py").write_text("import a_library_that_nobody_has\n")
    (package / "broken.py").write_text("level = 1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    for name in [name for name in sys.modules if name.startswith("my_package_of_tasks")]:
        monkeypatch.delitem(sys.modules, name)
    return tmp_path


def load(target: str, level: int = 3) -> object:
    return load_task(ImportedTaskConfig(target=target, args={"level": level}), seed=5)


def test_the_built_in_task_loads() -> None:
    assert isinstance(load_task(ColorCodewordConfig(), seed=0), ColorCodeword)


def test_a_user_task_loads_by_its_import_path_with_its_settings_and_seed(folder: Path) -> None:
    task = load("my_package_of_tasks.counting:Counting", level=2)
    assert vars(task) == {"level": 2, "seed": 5}
    load("my_package_of_tasks.counting:Structural")


def test_a_task_without_demonstrations_says_so_where_one_is_asked_for(folder: Path) -> None:
    task = load_task(ImportedTaskConfig("my_package_of_tasks.counting:Counting", args={"level": 2}), seed=0)
    with pytest.raises(NotImplementedError, match=r"Counting.demonstration is not defined.*trainer.warmup.steps=0"):
        task.demonstration(task.problem("train", 0), random_answers=True, seed=0)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("counting", "is not of the form package.module:Class"),
        ("counting.Counting", "is not of the form package.module:Class"),
        ("counting:", "is not of the form package.module:Class"),
        (":Counting", "is not of the form package.module:Class"),
        ("my package:Counting", "is not of the form package.module:Class"),
        ("???", "is not of the form package.module:Class"),
        ("no_such_package.counting:Counting", "a module that does not exist .*'no_such_package'.*PYTHONPATH"),
        ("my_package_of_tasks.countin:Counting", "a module that does not exist .*'my_package_of_tasks.countin'"),
        ("my_package_of_tasks.counting.x:Counting", "a module that does not exist .*is not a package"),
        ("my_package_of_tasks.needy:Counting", "does not import .*a_library_that_nobody_has.*: install 'a_library"),
        ("my_package_of_tasks.counting:Countin", "'Countin', which .*it has Counting, Structural"),
        ("my_package_of_tasks:Counting", "'Counting', which .*: define a Task class there"),
        ("my_package_of_tasks.counting:make_task", "is a function, not a Task class.*it has Counting"),
        ("my_package_of_tasks.counting:Dots", "does not define problem, env, demonstration, so"),
        ("my_package_of_tasks.counting:NoEnv", "does not define env, so a run would stop"),
        ("my_package_of_tasks.counting:NoSeed", "cannot be called as NoSeed.*unexpected keyword argument 'seed'"),
    ],
)
def test_a_wrong_target_is_a_config_error_that_names_the_key(folder: Path, target: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load(target)
    assert str(caught.value).startswith(f"task.target={target} ")
    assert ": " in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_target_that_is_not_set_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"task.target=\?\?\? is not of the form"):
        load_task(TaskConfig(), seed=0)


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero ("),
        ("import sys; sys.exit(0)", "SystemExit: 0 ("),
        ("raise KeyboardInterrupt", None),
        ("from their_errors import BadText; raise BadText", "BadText: <a "),
        ("raise BaseException('a\\ud83d')", "BaseException: a\\ud83d"),
        ("raise GeneratorExit", "GeneratorExit"),
    ],
)
def test_what_the_users_own_code_raises_is_a_config_error(
    source: str, fault: str | None, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At import and in `__init__`; only Ctrl-C passes."""
    (folder / "their_errors.py").write_text("class BadText(Exception):\n    def __str__(self): raise SystemExit(3)\n")
    body = f"def explode():\n    {source}\n"
    task = "    def __init__(self, config, *, seed): explode()\n"
    package = folder / "my_package_of_tasks"
    (package / "at_import.py").write_text(f"{body}\nexplode()\n")
    (package / "at_init.py").write_text(
        f"from my_package_of_tasks.counting import Counting\n{body}\nclass T(Counting):\n{task}"
    )
    for target in ("at_import:T", "at_init:T"):
        path = f"my_package_of_tasks.{target}"
        if fault is None:
            with pytest.raises(KeyboardInterrupt):
                load(path)
            continue
        with pytest.raises(ConfigError) as caught:
            load(path)
        assert str(caught.value).startswith(f"task.target={path}: ")
        assert fault in str(caught.value)
        assert target.partition(":")[0] + ".py:" in str(caught.value), "the line"


def test_the_users_own_refusal_is_left_as_it_is(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"^task.args.level=0 asks for no dots"):
        load("my_package_of_tasks.counting:Picky")


def test_the_number_of_rows_of_the_first_examples(folder: Path) -> None:
    (folder / "rows_of_theirs.py").write_text(
        COUNTING
        + "\nclass Rows(Counting):\n    def num_rows(self, split):\n        return 30 if split == 'train' else 7\n"
    )
    for name, count, rows in (("Rows", 5, (5, 7)), ("Rows", 100, (30, 7)), ("Counting", 5, (5, None))):
        config = ImportedTaskConfig(target=f"rows_of_theirs:{name}", args={"level": 3}, num_examples=count)
        task = load_task(config, seed=0)
        assert (task.num_rows("train"), task.num_rows("eval")) == rows
