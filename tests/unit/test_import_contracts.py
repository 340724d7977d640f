"""Each import that the map forbids is planted in a copy of the package, and lint-imports catches it.

The contracts themselves stand in pyproject.toml. Two copies of every edge are planted, one at the top of a module and
one inside a function, because a lazy import couples two packages as much as an eager one.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from itertools import product
from pathlib import Path
from typing import Any

import pytest

import vlmrl

pytest.importorskip("importlinter", reason="pip install -e '.[dev]' brings lint-imports")

ROOT = Path(vlmrl.__file__).parents[1]
CONTRACTS: list[dict[str, Any]] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"][
    "contracts"
]
LAYERS = [re.findall(r"\w+", layer) for layer in CONTRACTS[0]["layers"]]
"""Top to bottom; packages of one layer may not import each other."""


def lint(folder: Path) -> tuple[int, str]:
    """lint-imports on the package in `folder` → exit code and report."""
    command = [
        sys.executable,
        "-c",
        "import sys; from importlinter.cli import lint_imports_command as l; l()",
        "--no-cache",
    ]
    ended = subprocess.run(
        command, cwd=folder, env=os.environ | {"PYTHONPATH": str(folder)}, capture_output=True, text=True, check=False
    )
    return ended.returncode, ended.stdout + ended.stderr


def forbidden_edges() -> set[tuple[str, str]]:
    """(importer, imported) for every pair that the map forbids; packages that do not exist yet are left out."""
    there = [[name for name in layer if exists(name)] for layer in LAYERS]
    upwards = {
        (below, above)
        for i, layer in enumerate(there)
        for higher in there[:i]
        for below, above in product(layer, higher)
    }
    sideways = {(one, other) for layer in there for one, other in product(layer, layer) if one != other}
    return upwards | sideways


def exists(name: str) -> bool:
    return (ROOT / "vlmrl" / name).is_dir() or (ROOT / "vlmrl" / f"{name}.py").is_file()


def plant(folder: Path, importer: str, statement: str, number: int) -> None:
    """Add a module with the statement at its top and one with it inside a function; to a file, both at its end."""
    inside = f"def planted_{number}() -> None:\n    {statement}\n"
    package = folder / "vlmrl" / importer
    if package.is_dir():
        (package / f"planted_top_{number}.py").write_text(f"{statement}\n")
        (package / f"planted_inside_{number}.py").write_text(inside)
    else:
        with (folder / "vlmrl" / f"{importer}.py").open("a") as file:
            file.write(f"\n\n{statement}\n\n\n{inside}")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A folder with a copy of the package and of the contracts."""
    shutil.copytree(ROOT / "vlmrl", tmp_path / "vlmrl", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_package_keeps_its_contracts_without_exceptions() -> None:
    assert all(contract["ignore_imports"] == [] for contract in CONTRACTS)
    code, report = lint(ROOT)
    assert code == 0, report


def assert_each_is_caught(copy: Path, planted: list[tuple[str, str]]) -> None:
    """Plant every (importer below vlmrl, imported module) and see lint-imports name each of them, twice."""
    for number, (importer, imported) in enumerate(planted):
        plant(copy, importer, f"import {imported}", number)
    code, report = lint(copy)
    assert code == 1
    for number, (importer, imported) in enumerate(planted):
        if (copy / "vlmrl" / importer).is_dir():
            for where in ("top", "inside"):
                assert f"vlmrl.{importer}.planted_{where}_{number} -> {imported}" in report, (importer, imported)
        else:
            lines = rf"vlmrl\.{importer} -> {re.escape(imported)} \(l\.\d+, l\.\d+\)"
            assert re.search(lines, report), (importer, imported)


def test_each_forbidden_import_between_packages_is_caught(copy: Path) -> None:
    edges = sorted(forbidden_edges())
    assert len(edges) > 100
    assert_each_is_caught(copy, [(importer, f"vlmrl.{imported}") for importer, imported in edges])


def test_each_forbidden_library_is_caught(copy: Path) -> None:
    planted = {
        (source.removeprefix("vlmrl."), library)
        for contract in CONTRACTS[1:]
        for source in contract["source_modules"]
        for library in contract["forbidden_modules"]
    }
    assert_each_is_caught(copy, sorted(planted))


def test_every_source_package_of_a_forbidden_library_is_listed() -> None:
    """A new package must not slip past the contracts about Hydra and vLLM."""
    packages = {name for layer in LAYERS for name in layer if exists(name)}
    knows = {"hydra": {"cli", "__main__"}, "vllm": {"inference", "weight_sync", "__main__"}}
    for contract in CONTRACTS[2:]:
        (library,) = contract["forbidden_modules"]
        assert {source.removeprefix("vlmrl.") for source in contract["source_modules"]} == packages - knows[library]
