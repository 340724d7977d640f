"""The supervisor with real processes: whichever process dies first, no process of the server survives."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from vlmrl.inference.vllm.in_server import supervisor

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="subreapers are Linux")

# As in vLLM: an API server, its engine in a session of its own, which would outlive it, and the engine's worker.
API_SERVER = """
import subprocess, sys, time
engine = subprocess.Popen([sys.executable, "-c", sys.argv[1]], start_new_session=True, stdout=subprocess.PIPE)
print(engine.pid, engine.stdout.readline().decode().strip(), flush=True)
time.sleep(600)
"""
ENGINE = """
import mmap, os, signal, subprocess, sys, time
with open(f"/dev/shm/vlmrl-test-{os.getpid()}", "wb+") as shared:
    shared.truncate(32)
    semaphore = mmap.mmap(shared.fileno(), 32)
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(worker.pid, flush=True)
time.sleep(600)
"""
STUBBORN_ENGINE = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + ENGINE

SITE = Path(supervisor.__file__).parent / "site"
RUN = """
import os, subprocess, sys
path = os.pathsep.join([sys.argv[2], os.environ.get("PYTHONPATH", "")])
environment = os.environ | {"VLMRL_SERVER_LOCK": sys.argv[1], "PYTHONPATH": path}
supervisor = subprocess.Popen(sys.argv[3:], stdin=subprocess.PIPE, start_new_session=True, env=environment)
for line in sys.stdin:
    supervisor.stdin.write(line.encode())
    supervisor.stdin.flush()
    print("told", flush=True)
supervisor.stdin.close()
sys.exit(supervisor.wait() != 0)
"""


class Run:
    """A run with a supervised server; `processes` are the guard and all its descendants."""

    def __init__(self, engine: str, lock: Path) -> None:
        server = [sys.executable, "-c", API_SERVER, engine]
        command = [sys.executable, "-m", "vlmrl.inference.vllm.in_server.supervisor", *server]
        self.process = subprocess.Popen(
            [sys.executable, "-c", RUN, str(lock), str(SITE), *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.engine, self.worker = map(psutil.Process, map(int, self.process.stdout.readline().split()))
        self.guard, self.supervisor, self.api_server = psutil.Process(self.process.pid).children(recursive=True)[:3]
        self.processes = [self.guard, self.supervisor, self.api_server, self.engine, self.worker]
        self.shared = Path(f"/dev/shm/vlmrl-test-{self.engine.pid}")
        assert self.shared.exists()

    def survivors(self, timeout_s: float = 30.0) -> list[psutil.Process]:
        """The processes that still run after `timeout_s`. A zombie has ended, and its parent here may not reap it."""
        end = time.monotonic() + timeout_s
        while (alive := [p for p in self.processes if supervisor.is_alive(p)]) and time.monotonic() < end:
            time.sleep(0.02)
        return alive


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    yield from started(ENGINE, tmp_path)


@pytest.fixture
def stubborn_run(tmp_path: Path) -> Iterator[Run]:
    yield from started(STUBBORN_ENGINE, tmp_path)


def started(engine: str, folder: Path) -> Iterator[Run]:
    run = Run(engine, folder / "lock")
    yield run
    run.shared.unlink(missing_ok=True)
    for process in run.processes:
        if process.is_running():
            process.kill()
    run.process.kill()
    run.process.communicate()


def test_no_process_is_left_when_the_run_closes_stdin(run: Run, tmp_path: Path) -> None:
    kept = tmp_path / "weights"
    kept.mkdir()
    assert run.process.communicate(f"{kept}\n", timeout=200)[0] == "told\n"
    assert run.survivors() == []
    assert kept.is_dir()  # the run is alive and may restart the server


def test_no_process_is_left_when_the_run_is_killed(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    (folder / "inside").mkdir(parents=True)
    assert run.process.stdin is not None
    run.process.stdin.write(f"{folder}\n")
    run.process.stdin.flush()
    assert run.process.stdout is not None
    assert run.process.stdout.readline() == "told\n"
    run.process.send_signal(signal.SIGKILL)
    assert run.survivors() == []
    assert not folder.exists()


def test_no_process_is_left_when_the_api_server_is_killed(run: Run) -> None:
    run.api_server.kill()
    run.process.communicate(timeout=200)
    assert run.process.returncode == 1
    assert run.survivors() == []


@pytest.mark.parametrize(
    "killed",
    [
        *("guard", "supervisor", "guard supervisor", "supervisor guard", "supervisor engine", "api_server supervisor"),
        *("process guard supervisor", "guard process", "process supervisor", "api_server guard supervisor"),
    ],
)
def test_no_process_is_left_whoever_is_killed(run: Run, killed: str) -> None:
    """`process` is the run."""
    for name in killed.split():
        getattr(run, name).kill()
    assert run.survivors() == []


@pytest.mark.parametrize("stopped", ["guard", "supervisor", "api_server", "engine", "worker"])
def test_no_process_is_left_of_a_killed_run_even_if_one_was_stopped(run: Run, stopped: str) -> None:
    getattr(run, stopped).suspend()
    run.process.kill()
    assert run.survivors() == []


@pytest.mark.parametrize("killed", ["api_server", "supervisor", "guard", "process"])
def test_shared_memory_of_killed_processes_is_removed(run: Run, killed: str) -> None:
    getattr(run, killed).kill()
    assert run.survivors() == []
    assert not run.shared.exists()


@pytest.mark.slow
def test_a_process_that_ignores_sigterm_is_killed(stubborn_run: Run) -> None:
    stubborn_run.process.send_signal(signal.SIGKILL)
    assert stubborn_run.survivors() == []


def test_slurms_signals_to_the_run_do_not_end_the_server(run: Run) -> None:
    """Slurm sends the signal that requests a checkpoint to all processes of a job."""
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        for process in run.processes:
            process.send_signal(number)
    assert set(run.survivors(timeout_s=1.0)) == set(run.processes)
    run.process.send_signal(signal.SIGKILL)
    assert run.survivors() == []
