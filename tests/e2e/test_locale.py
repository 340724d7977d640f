"""A locale of ASCII, in which Python cannot name a file that has another letter in its name."""

from __future__ import annotations

import json

import pytest

from support.command_line import PATIENCE, SHORT, Home
from support.processes import start

pytestmark = pytest.mark.slow


def test_a_folder_with_a_letter_that_the_locale_does_not_have(home: Home) -> None:
    run = home.path / "outputs/rün"
    ascii_only = {**home.environment, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    arguments = (*SHORT, "mode=eval", "monitor.report=true", f"hydra.run.dir={run}")
    process = start("-m", "vlmrl", *arguments, cwd=home.path, environment=ascii_only, cold=True)
    out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err) == (0, "")
    assert "r?n" in out, "the screen keeps its encoding"
    assert json.loads((run / "summary.json").read_text())["exit_reason"] == "finished"
    assert f"output_dir: {run}" in (run / "config.yaml").read_text(encoding="utf-8")
    assert (run / "report.html").exists()
