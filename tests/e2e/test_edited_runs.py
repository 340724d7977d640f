"""Run folders edited by hand, in every mode that reads them: one sentence, never a traceback, never a hang."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from support.command_line import Home

pytestmark = pytest.mark.slow

CHECKPOINT = "checkpoints/step_000006"
BOMB = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))

COMMANDS = """
import contextlib, io, json, signal, sys
from vlmrl.cli.main import main
found = []
for arguments in json.loads(sys.argv[1]):
    signal.alarm(60)
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        code = main(arguments)
    found.append([code, err.getvalue()])
print(json.dumps(found))
"""
"""Several commands in one process."""


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def endless(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def pipes(path: Path) -> None:
    for each in list(path.iterdir()):
        pipe(each)


EDITS: dict[str, tuple[str, Callable[[Path], object], tuple[str, ...]]] = {
    "bomb": ("config.yaml", lambda path: path.write_text(BOMB), ("resume", "report", "compare", "faults", "export")),
    "config": ("config.yaml", pipe, ("replay", "eval")),
    "log": ("logs/main.log", pipe, ("resume",)),
    "metrics": ("metrics.jsonl", folder, ("report", "compare")),
    "tokens": ("tokens.jsonl", pipe, ("report",)),
    "rollouts": ("rollouts/step_000002.parquet", endless, ("report", "faults", "replay")),
    "images": ("images", pipes, ("replay",)),
    "state": (f"{CHECKPOINT}/state.json", lambda path: path.write_text("[" * 100_000), ("eval", "export")),
}
"""Name → what is edited, how, and the modes that cannot do without it."""


def command(mode: str, run: Path) -> list[str]:
    return {
        "resume": [f"resume={run}"],
        "compare": ["mode=compare", f"runs={run}", f"hydra.run.dir={run.parent}/compared"],
        "replay": ["mode=replay", f"run={run}", "step=2"],
        "eval": ["mode=eval", f"resume={run}"],
        "export": ["mode=export", f"resume={run}"],
    }.get(mode, [f"mode={mode}", f"run={run}"])


def test_one_sentence_each(home: Home, never_stopped: Path, tmp_path: Path) -> None:
    commands, names = [], []
    for name, (file, edit, modes) in EDITS.items():
        run = Path(shutil.copytree(never_stopped, tmp_path / name, ignore=shutil.ignore_patterns("wandb")))
        for older in ("step_000002", "step_000004"):
            shutil.rmtree(run / "checkpoints" / older, ignore_errors=True)
        edit(run / file)
        commands += [command(mode, run) for mode in modes]
        names += [f"{name}, {mode}" for mode in modes]
    ended = home.vlmrl(json.dumps(commands), code=("-c", COMMANDS))
    assert ended.code == 0, ended.err
    for name, (code, err) in zip(names, json.loads(ended.out.splitlines()[-1]), strict=True):
        assert code in (1, 2), (name, code, err)
        assert err.startswith("error: "), (name, err)
        assert err.count("\n") == 1, (name, err)
        assert str(tmp_path / name.partition(",")[0]) in err, (name, err)
