"""A mistake gets the same message wherever it is found: at a dry run, a run, a job of a multirun, and a resume.

One process of its own calls the command line again and again, as a user would, and notes what it prints.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from support.composing import compose_as_hydra
from vlmrl.cli.arguments import groups
from vlmrl.cli.recipe import RECIPE
from vlmrl.config.conf_folder import PACKAGE
from vlmrl.config.parse import parse
from vlmrl.record.run_dir import RunDir

BENCHMARK = runpy.run_path(str(PACKAGE.parent / "benchmarks/wrong_configs.py"))
WRONG: tuple[tuple[str, ...], ...] = BENCHMARK["WRONG"]
MORE: tuple[tuple[str, ...], ...] = BENCHMARK["MORE"]

MISSING = ("torchao", "peft")
"""Packages that the process is to find missing, whether they are installed or not."""

START = """
import contextlib, io, json, os, sys
for name in sys.argv[2].split(","):
    sys.modules[name] = None
from vlmrl.cli.main import main
ended = []
for arguments in json.loads(open(sys.argv[1]).read()):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    ended.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(ended))
"""


def is_resumable(arguments: tuple[str, ...]) -> bool:
    """Whether `resume=` takes all of these: values of keys, no groups, no mode."""
    keys = [argument.partition("=")[0] for argument in arguments]
    return not any(key.startswith("~") or key in ("mode", *groups()) for key in keys)


def message_of(way: str, code: int, out: str, err: str) -> str:
    """The message as it stands alone."""
    if way == "dry run" and code == 0:  # the run could start elsewhere: a row of the plan
        (message,) = re.findall(r"^missing here +(.*)$", out, re.MULTILINE)
        return str(message)
    first = next(line for line in err.splitlines() if line.startswith("error: "))
    return re.sub(r"^error: (in the job .*?: )?", "", first)


@pytest.fixture(scope="module")
def resumed_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a default run that can be resumed."""
    run_dir = RunDir(tmp_path_factory.mktemp("resumed") / "run")
    run_dir.create()
    run_dir.write_config(parse(compose_as_hydra(f"output_dir={run_dir.path}", RECIPE)))
    return run_dir.path


@pytest.fixture(scope="module")
def messages(resumed_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], dict[str, str]]:
    """Command line → way in which it was started → message."""
    starts: list[tuple[tuple[str, ...], str, list[str]]] = []
    for arguments in (*WRONG, *MORE):
        starts += [
            (arguments, "dry run", [*arguments, "dry_run=true"]),
            (arguments, "run", [*arguments]),
            (arguments, "multirun job", ["--multirun", *arguments]),
        ]
        if is_resumable(arguments):
            starts.append((arguments, "resume", [f"resume={resumed_run}", *arguments]))
    folder = tmp_path_factory.mktemp("started")
    (folder / "starts.json").write_text(json.dumps([line for _, _, line in starts]))
    ended = subprocess.run(
        [sys.executable, "-c", START, "starts.json", ",".join(MISSING)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=900,  # a hundred and fifty starts; it waits for none of them
        check=True,
    )
    found: dict[tuple[str, ...], dict[str, str]] = {}
    for (arguments, way, _), (code, out, err) in zip(starts, json.loads(ended.stdout), strict=True):
        assert code == 2 or (way == "dry run" and "missing here" in out), (arguments, way, out, err)
        assert "Traceback" not in err, (arguments, way)
        found.setdefault(arguments, {})[way] = message_of(way, code, out, err)
    return found


@pytest.mark.parametrize("arguments", [*WRONG, *MORE], ids=" ".join)
def test_the_message_is_the_same_in_every_way(
    arguments: tuple[str, ...], messages: dict[tuple[str, ...], dict[str, str]]
) -> None:
    ways = messages[arguments]
    assert {"dry run", "run", "multirun job"} <= ways.keys()
    assert set(ways.values()) == {ways["run"]}, ways


def test_enough_of_them_are_resumed(messages: dict[tuple[str, ...], dict[str, str]]) -> None:
    assert sum("resume" in ways for ways in messages.values()) >= 15
