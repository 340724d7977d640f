"""The lock of a run folder: one writer, named, gone with its process."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from support.lock_holders import HOLD, locked_by_another
from vlmrl.errors import ConfigError
from vlmrl.record.lock import LOCK_FILE, RunLock, holder_of, network_file_system
from vlmrl.record.run_dir import RunDir


def test_a_second_process_is_refused_and_told_who_holds_the_lock(tmp_path: Path) -> None:
    with locked_by_another(tmp_path) as process:
        found = holder_of(tmp_path)
        assert found is not None
        assert (found.pid, found.host, found.mode) == (process.pid, os.uname().nodename, "rl")
        said = f"{tmp_path} is in use by process {process.pid} on {found.host} (mode=rl, since {found.since})"
        with pytest.raises(ConfigError, match=re.escape(said)), RunLock(tmp_path, "rl"):
            pytest.fail("let in")
        (tmp_path / "other").symlink_to(tmp_path)
        with pytest.raises(ConfigError), RunDir(tmp_path / "other").lock("sft"):
            pytest.fail("let in by another path")


@pytest.mark.parametrize("end", ["killed", "by itself"])
def test_the_lock_ends_with_its_process(end: str, tmp_path: Path) -> None:
    with locked_by_another(tmp_path) as process:
        if end == "killed":
            process.kill()
            process.wait()
            assert (tmp_path / LOCK_FILE).exists()
    assert holder_of(tmp_path) is None
    with RunLock(tmp_path, "rl"):
        assert (tmp_path / LOCK_FILE).exists()
    assert not (tmp_path / LOCK_FILE).exists()


def test_a_child_of_a_dead_run_does_not_keep_the_lock(tmp_path: Path) -> None:
    """User code may fork (multiprocessing), and its children may live longer than the run."""
    fork = "    import os, time\n    if os.fork() == 0: time.sleep(60)\n"
    script = HOLD.replace("    print", f"{fork}    print")
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "locked\n"
        assert holder_of(tmp_path) is not None
        process.kill()
        process.wait()
        with RunLock(tmp_path, "rl"):
            pass
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.stdin.close()
        process.stdout.close()


def test_a_lock_inside_a_lock_is_the_same(tmp_path: Path) -> None:
    """A sweep holds the lock of the job that it starts."""
    with RunLock(tmp_path, "rl"):
        with RunLock(tmp_path, "rl"):
            pass
        assert holder_of(tmp_path) is None, "its own"
        command = [sys.executable, "-c", HOLD, str(tmp_path)]
        refused = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        assert f"in use by process {os.getpid()}" in refused.stderr


def test_of_many_at_once_exactly_one_is_let_in(tmp_path: Path) -> None:
    """Also while holders come and go, which removes the file that the others wait for."""
    code = """
import sys, time
from pathlib import Path
from vlmrl.record.lock import RunLock
inside = Path(sys.argv[1]) / "inside"
for _ in range(100):
    with RunLock(Path(sys.argv[1]), "rl"):
        inside.touch(exist_ok=False)
        time.sleep(0.001)
        inside.unlink()
"""
    processes = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]


def test_asking_does_not_keep_a_writer_out(tmp_path: Path) -> None:
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            holder_of(tmp_path)

    descriptor = os.open(tmp_path / LOCK_FILE, os.O_RDWR | os.O_CREAT)
    asking = threading.Thread(target=ask)
    asking.start()
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    threading.Timer(0.2, os.close, [descriptor]).start()
    with RunLock(tmp_path, "rl"):
        over.set()
    asking.join()


def test_a_file_system_without_locks_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with RunLock(tmp_path, "rl"):
        pass
    assert "this file system has no locks" in caplog.text


def test_the_type_of_a_network_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert network_file_system(tmp_path) is None
    mounts = f"1 0 0:1 / / rw - ext4 /dev/a rw\n2 1 0:2 / {tmp_path} rw shared:1 - nfs4 server:/home rw\n"
    monkeypatch.setattr(Path, "read_bytes", lambda path: mounts.encode())
    assert network_file_system(tmp_path / "outputs") == "nfs4"
    assert network_file_system(Path("/somewhere")) is None


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"), RunDir(tmp_path / "file/run").lock("rl"):
        pytest.fail("let in")
