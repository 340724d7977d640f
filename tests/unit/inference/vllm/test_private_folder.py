"""Folders that only the user can open, and that are removed whoever dies."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from vlmrl.inference.vllm.private_folder import LONGEST_NAME, SOCKET_PATH_LIMIT, PrivateFolder, socket_root

OWNER = """
import sys, time
from pathlib import Path
from vlmrl.inference.vllm.private_folder import PrivateFolder
folder = PrivateFolder("server", Path(sys.argv[1]))
(folder.path / "inside").mkdir()
print(folder.path, flush=True)
time.sleep(600)
"""


def test_the_folder_of_a_killed_owner_is_removed_by_the_next(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        theirs = Path(owner.stdout.readline().strip())
        mine = PrivateFolder("server", tmp_path)
        assert stat.S_IMODE(mine.path.stat().st_mode) == 0o700
        assert theirs.exists()
        owner.kill()
        owner.wait()
        other_kind = PrivateFolder("weights", tmp_path)
        assert theirs.exists()
        second = PrivateFolder("server", tmp_path)
        assert not theirs.exists()
        assert mine.path.exists()
    for folder in (mine, other_kind, second, second):
        folder.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_another_host_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a shared disk the locks of other hosts may not be visible."""
    folder = tmp_path / "vlmrl-server-theirs"
    folder.mkdir()
    (folder / "alive").write_text("another-host")
    PrivateFolder("server", tmp_path).remove()
    assert folder.exists()
    monkeypatch.setattr("socket.gethostname", lambda: "another-host")
    PrivateFolder("server", tmp_path).remove()
    assert not folder.exists()


def test_a_long_tmpdir_is_no_place_for_sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    assert len(os.fsencode(socket_root())) + LONGEST_NAME <= SOCKET_PATH_LIMIT
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
