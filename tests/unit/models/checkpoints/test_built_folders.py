"""A cached folder is whole, whenever its builder was killed and whatever it found there."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from support import processes
from vlmrl.models.checkpoints import built_folders
from vlmrl.models.checkpoints.built_folders import MANIFEST, built

FILES = {"config.json": b"{}", "model.safetensors": bytes(5000)}

BUILDER = """
import os, signal, sys
from pathlib import Path
from vlmrl.models.checkpoints.built_folders import built

left = int(sys.argv[1])

def build(folder):
    (folder / "config.json").write_bytes(b"{}")
    (folder / "model.safetensors").write_bytes(bytes(5000))

def hook(event, arguments):
    global left
    if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

sys.addaudithook(hook)
built("kind", ["key"], build)
os._exit(0)
"""
"""Builds a folder and is killed right before its n-th file operation."""


def build(folder: Path) -> None:
    for name, content in FILES.items():
        (folder / name).write_bytes(content)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != MANIFEST}


@pytest.mark.parametrize("found", ["nothing", "damaged"])
def test_a_builder_that_was_killed_leaves_a_whole_folder_or_none(
    found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLMRL_CACHE", str(tmp_path))
    for operations in range(60):
        if found == "damaged":
            (built("kind", ["key"], build) / "model.safetensors").write_bytes(b"half")
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        killed = processes.start("-c", BUILDER, str(operations), cwd=tmp_path, environment=environment)
        killed.communicate(timeout=200)
        assert contents(built("kind", ["key"], build)) == FILES, operations
        if killed.returncode == 0:
            break
        assert killed.returncode == -signal.SIGKILL
        if found == "nothing":
            for path in (tmp_path / "kind").glob("[!.]*"):
                path.rename(tmp_path / f"built_{operations}")
    assert 5 < operations < 59, "it was killed at every operation, and then at none"


def test_what_killed_builders_left_is_removed_after_a_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLMRL_CACHE", str(tmp_path))
    (tmp_path / "kind").mkdir()
    old, new = tmp_path / "kind/.0123456789abcdef-old", tmp_path / "kind/.0123456789abcdef-new"
    for each in (old, new):
        each.mkdir()
        (each / "model.safetensors").write_bytes(b"half")
    long_ago = old.stat().st_mtime - built_folders.ABANDONED_AFTER_S - 10
    os.utime(old, (long_ago, long_ago))
    folder = built("kind", ["key"], build)
    assert (old.exists(), new.exists(), contents(folder)) == (False, True, FILES)
