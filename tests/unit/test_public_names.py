"""The names that `vlmrl` offers are those that its documentation and examples import, no more and no fewer."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import vlmrl

PACKAGE = Path(vlmrl.__file__).parent
REPOSITORY = PACKAGE.parent


def examples() -> Iterator[str]:
    """Everything that shows a user how to write a task or a loss."""
    yield from (path.read_text() for path in (REPOSITORY / "README.md", *(REPOSITORY / "docs").rglob("*.md")))
    yield from (path.read_text() for path in (PACKAGE / "cli/template").glob("*.py"))
    yield from (path.read_text() for path in (REPOSITORY / "tests/support").glob("their_*.py"))
    for path in PACKAGE.rglob("*.py"):  # examples in docstrings
        constants = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant))
        yield from (node.value for node in constants if isinstance(node.value, str))


def imported_names(text: str) -> set[str]:
    """The names in `from vlmrl import …`, also inside a doctest."""
    lists = re.findall(r"^\s*(?:>>> )?from vlmrl import (\([^)]*\)|[^\n#]*)", text, re.MULTILINE)
    names = {name.split()[0] for each in lists for name in each.strip("()").split(",") if name.strip()}
    return {name for name in names if name.isidentifier()}


def test_how_names_are_found() -> None:
    text = "    from vlmrl import A, B as C  # D\nfrom vlmrl import (\n    E,\n    F,\n)\nfrom vlmrl.types import G\n"
    assert imported_names(text) == set("ABEF")


@pytest.mark.skipif(not (REPOSITORY / "README.md").exists(), reason="not a checkout")
def test_the_public_names_are_those_of_the_examples() -> None:
    used = set().union(*map(imported_names, examples())) | {"__version__"}
    assert sorted(vlmrl.__all__) == sorted(used)


def test_every_public_name_is_there_for_type_checkers_too() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    homes = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert {*homes, "__version__"} == set(vlmrl.__all__)
    for name, home in homes.items():
        assert home is not None
        assert getattr(vlmrl, name) is getattr(importlib.import_module(home), name)
    assert set(vlmrl.__all__) <= set(dir(vlmrl))


def test_an_unknown_name() -> None:
    with pytest.raises(AttributeError, match="module 'vlmrl' has no attribute 'Tsak'"):
        vlmrl.Tsak  # type: ignore[attr-defined]  # noqa: B018


def test_the_version_is_pyprojects() -> None:
    pyproject = REPOSITORY / "pyproject.toml"
    if not pyproject.exists():
        pytest.skip("not a checkout")
    assert vlmrl.__version__ == tomllib.loads(pyproject.read_text())["project"]["version"]


@pytest.mark.parametrize("names", ["", "ConfigError", "Task, Reply, Image, Message, Text, check_task"])
def test_a_task_needs_no_torch(names: str) -> None:
    statement = f"from vlmrl import {names}" if names else "import vlmrl"
    code = (
        f"import sys; {statement}; print([name for name in ('torch', 'transformers', 'hydra') if name in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=200)
    assert ended.stdout.strip() == "[]"
