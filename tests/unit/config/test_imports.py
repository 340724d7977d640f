"""The schema imports nothing heavy, so `explain`, `--help` and other programs read it quickly."""

from __future__ import annotations

import os
import pkgutil
import subprocess
import sys
import textwrap

import pytest

import vlmrl.config

MODULES = sorted(
    module.name for module in pkgutil.walk_packages(vlmrl.config.__path__, prefix=f"{vlmrl.config.__name__}.")
)
HEAVY = {"torch", "hydra", "transformers", "vllm", "wandb"}

REPORT_HEAVY = f"""
import importlib, sys
importlib.import_module(sys.argv[1])
print(",".join(sorted({HEAVY!r} & {{name.partition(".")[0] for name in sys.modules}})))
"""


def heavy_imports(module: str) -> str:
    """The heavy packages that a fresh process has imported after `module`, separated by commas."""
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(REPORT_HEAVY), module],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    return process.stdout.strip()


@pytest.mark.parametrize("module", MODULES)
def test_a_fresh_process_imports_no_heavy_package(module: str) -> None:
    assert heavy_imports(module) == ""


def test_a_heavy_import_is_found() -> None:
    assert heavy_imports("hydra") == "hydra"
