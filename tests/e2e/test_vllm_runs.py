"""`python -m vlmrl inference=vllm`, with real servers on the CPU: it learns, on-policy and not, and survives deaths.

The two runs that learn take minutes each; they are what a release must show, and come last.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import pytest

from support.command_line import REPOSITORY, SHORT, Home, summary, until
from vlmrl.inference.vllm.server import vllm_version
from vlmrl.record.metrics import read_metrics
from vlmrl.record.rollouts import read_rollouts

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(vllm_version() is None, reason="vLLM is not installed"),
]

STARTED_S = 180.0
"""Servers of two replicas, on a busy machine."""

WARMED_UP_S = 900.0
"""The same, and the supervised steps of a whole run."""


def steps_of(run: Path) -> int:
    path = run / "metrics.jsonl"
    return max((line["step"] for line in read_metrics(path)), default=0) if path.exists() else 0


def engines(process: psutil.Process) -> list[psutil.Process]:
    """The API servers below a run."""

    def command(child: psutil.Process) -> list[str]:
        try:
            return list(child.cmdline())
        except psutil.NoSuchProcess:  # for example the one that made a report
            return []

    return [
        child
        for child in process.children(recursive=True)
        if "vllm.entrypoints.openai.api_server" in command(child)
        and "vlmrl.inference.vllm.in_server.supervisor" not in command(child)
    ]


SHARED = Path("/dev/shm")


def mapped(processes: list[psutil.Process]) -> set[int]:
    """Inodes of the files of shared memory that they have mapped."""
    found = set()
    for process in processes:
        with suppress(OSError):
            lines = Path(f"/proc/{process.pid}/maps").read_text(encoding="utf-8", errors="replace").splitlines()
            found |= {int(line.split()[4]) for line in lines if f" {SHARED}/" in line}
    return found


def sums(run: Path, key: str) -> float:
    lines = read_metrics(run / "metrics.jsonl")
    return float(sum(line.get(key, 0.0) + line.get(f"eval/{key}", 0.0) for line in lines))


THIEF = """
import os, socket, sys, time
os.setgid(65534); os.setuid(65534)
def servers():
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = open(f"/proc/{pid}/cmdline", "rb").read().split(bytes(1))
        except OSError:
            continue
        if b"--model" not in words or not words[words.index(b"--model") + 1].decode().startswith(sys.argv[1]):
            continue  # another run's
        if b"--uds" in words:
            yield words[words.index(b"--uds") + 1].decode()
        if b"--port" in words and b"vllm.entrypoints.openai.api_server" in words:
            print("PORT", words, flush=True)
tried = set()
while True:
    for path in servers():
        if path in tried:
            continue
        tried.add(path)
        for attempt in ("connect", "bind"):
            try:
                getattr(socket.socket(socket.AF_UNIX), attempt)(path)
                print("REACHED", attempt, path, flush=True)
            except PermissionError:
                print("refused", attempt, path, flush=True)
    time.sleep(0.2)
"""
"""Another user who watches for servers that start, and tries to reach them or to listen in their place."""


@pytest.fixture
def short_tmpdir(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for temporary files whose name is short enough for sockets; pytest's own is not."""
    with tempfile.TemporaryDirectory(prefix="e2e-") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        yield Path(folder)


@pytest.mark.timeout(900)
def test_a_run_survives_its_servers_and_leaves_nothing(
    home: Home, short_tmpdir: Path, request: pytest.FixtureRequest
) -> None:
    """In one run's life: a thief waits for every start, the engine hangs, a supervisor is killed, and the run is
    killed. Then it resumes."""
    run = home.path / "outputs/survives"
    weights = Path(tempfile.mkdtemp(dir=SHARED))
    request.addfinalizer(lambda: shutil.rmtree(weights))
    shared: set[int] = set()  # other runs have files there too
    changed = ("orchestrator.max_staleness=1", "trainer.max_steps=60", "orchestrator.eval.every=0")
    engine_settings = ("inference=vllm", "inference.request_timeout_s=10", f"weight_sync.root={weights}")
    arguments = (*SHORT, *engine_settings, *changed)
    is_root = os.geteuid() == 0
    command = [sys.executable, "-c", THIEF if is_root else "", str(home.cache)]  # where the model of a server is
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as thief, ExitStack() as ending:
        ending.callback(thief.kill)  # also where an assertion fails: leaving the block waits for it
        process = home.start(*arguments, f"hydra.run.dir={run}", cold=True)  # a warm process may know another TMPDIR

        def go_on(what: str) -> None:
            before = steps_of(run)
            until(lambda: process.poll() is not None or steps_of(run) >= before + 3, what, STARTED_S, 0.05)
            assert process.poll() is None, process.communicate()
            shared.update(mapped(psutil.Process(process.pid).children(recursive=True)))

        request.addfinalizer(process.kill)
        go_on("the third step")
        (api_server,) = engines(psutil.Process(process.pid))
        (engine,) = [child for child in api_server.children() if child.name().startswith("VLLM::")]
        engine.suspend()
        go_on("steps after an engine was stopped")
        (api_server,) = engines(psutil.Process(process.pid))
        supervisor = api_server.parent()
        assert supervisor is not None
        supervisor.kill()
        go_on("steps after a supervisor was killed")

        below = psutil.Process(process.pid).children(recursive=True)
        assert len(below) >= 5
        recorded = steps_of(run)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        _, alive = psutil.wait_procs(below, timeout=200)
        assert alive == []
        assert len(shared) >= 3, "each of three servers had semaphores at least"
        assert [entry.name for entry in os.scandir(SHARED) if entry.inode() in shared] == []
        assert list(weights.iterdir()) == []
        assert [
            path.name for path in short_tmpdir.iterdir() if not path.name.startswith(("tmp", "torchinductor"))
        ] == []
        thief.kill()
        found = thief.communicate()[0].splitlines()
    if is_root:
        assert len(found) == 6, found  # two attempts at each of three starts
        assert all(line.startswith("refused") for line in found)
    done = steps_of(run)
    rollouts = {path.name for path in (run / "rollouts").iterdir()}
    assert {f"step_{step:06}.parquet" for step in range(1, recorded)} <= rollouts

    ended = home.vlmrl(f"resume={run}", f"trainer.max_steps={done + 3}")
    assert (ended.code, ended.err) == (0, "")
    lines = {line["step"]: line for line in read_metrics(run / "metrics.jsonl") if line["step"]}
    assert sorted(lines) == list(range(1, done + 4))
    assert sum(line["inference/restarts"] for line in lines.values()) == 2
    assert all(line["rollouts/dropped"] == 0 for line in lines.values())
    assert max(line["staleness/max"] for line in lines.values()) == 1


@pytest.mark.parametrize("correction", ["truncated", pytest.param("none", marks=pytest.mark.release)])
def test_what_is_done_about_stale_tokens_is_seen_in_the_metrics(home: Home, correction: str) -> None:
    run = home.path / f"outputs/stale_{correction}"
    ended = home.vlmrl(
        *SHORT,
        "inference=vllm",
        "orchestrator.max_staleness=3",
        "trainer.learning_rate=2e-2",  # far apart, within three steps
        "algorithm.importance_cap=1.1",
        f"algorithm.importance_correction={correction}",
        f"hydra.run.dir={run}",
    )
    assert (ended.code, ended.err) == (0, "")
    stale = [line for line in read_metrics(run / "metrics.jsonl") if line.get("staleness/max", 0) > 0]
    assert len(stale) >= 3
    assert max(line["staleness/max"] for line in stale) <= 3
    assert max(line["mismatch_kl/mean"] for line in stale) > 1e-6
    versions = {
        v for r in read_rollouts(run / "rollouts/step_000006.parquet") for t in r["turns"] for v in t["versions"]
    }
    assert versions <= {2, 3, 4, 5}
    cut = [line["importance/cut_fraction"] for line in stale]
    weight = [line["importance/weight_mean"] for line in stale]
    if correction == "none":
        assert weight == [1.0] * len(stale)
        assert min(line["importance/ess"] for line in stale) == 1.0
    else:
        assert 0 < max(cut) < 1
        assert any(abs(mean - 1.0) > 1e-4 for mean in weight)
        assert min(line["importance/ess"] for line in stale) < 1.0


@pytest.mark.release  # unit/inference/vllm/test_families.py has the same server, with direct requests
def test_a_run_with_videos(home: Home) -> None:
    """Two videos, and in every second problem an image beside the first: each goes over the wire once, for a group of
    siblings with two turns, and is the trainer's."""
    run = home.path / "outputs/clips"
    task = f"task={REPOSITORY}/tests/support/moving_clips.py:MovingClips"
    clips = ("model=qwen3vl_tiny", "orchestrator/renderer=template", task, "task.max_turns=2")
    short = (
        "trainer.max_steps=3",
        "trainer.warmup.steps=2",
        "orchestrator.eval.every=0",
        "monitor.wandb.mode=disabled",
    )
    groups = ("orchestrator.groups_per_step=4", "orchestrator.group_size=8", "orchestrator.max_new_tokens=8")
    ended = home.vlmrl("inference=vllm", *clips, *short, *groups, f"hydra.run.dir={run}")
    assert (ended.code, ended.err) == (0, "")
    lines = [line for line in read_metrics(run / "metrics.jsonl") if line["step"]]
    assert len(lines) == 3
    assert max(line["mismatch_kl/mean"] for line in lines) <= 1e-8
    # A step's count has the images that were sent ahead for the next one.
    assert sum(line["wire/images_sent"] for line in lines) <= 3 * (4 * 2 + 2)
    assert all(line["wire/bytes_saved"] > line["wire/bytes_sent"] for line in lines)


@pytest.mark.release
@pytest.mark.parametrize("staleness", [0, 2])
@pytest.mark.timeout(1800)
def test_the_task_is_learned(home: Home, request: pytest.FixtureRequest, staleness: int) -> None:
    """On policy it is sampled by two servers, of which one is killed on the way. Half of the held-out codewords are
    enough to tell: one in 6,561 is right by chance, and the second half takes as long again."""
    run = home.path / f"outputs/learned_{staleness}"
    replicas = 1 if staleness else 2
    process = home.start(
        "inference=vllm",
        f"inference.replicas={replicas}",
        f"orchestrator.max_staleness={staleness}",
        "orchestrator.eval.target=0.5",
        "monitor.wandb.mode=disabled",
        f"hydra.run.dir={run}",
    )
    request.addfinalizer(process.kill)
    if replicas == 2:
        until(lambda: process.poll() is not None or steps_of(run) >= 3, "the third step", WARMED_UP_S, 0.05)
        assert process.poll() is None, process.communicate()
        servers = engines(psutil.Process(process.pid))
        assert len(servers) == 2
        servers[0].send_signal(signal.SIGKILL)
    _, err = process.communicate(timeout=1700)
    assert (process.returncode, err) == (0, "")
    found = summary(run)
    assert found["exit_reason"] == "target_reached"
    assert min(found["eval/reward"], found["eval/reward_greedy"]) >= 0.5
    lines = [line for line in read_metrics(run / "metrics.jsonl") if line["step"]]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert max(line["staleness/max"] for line in lines) == staleness
    assert all(line["rollouts/dropped"] == 0 for line in lines)
    if staleness == 0:
        assert max(line["mismatch_kl/mean"] for line in lines) <= 1e-8
        assert any("restart 1 of" in warning for warning in found["warnings"])
    else:
        assert min(line["time/engine_idle"] / line["time/step"] for line in lines) < 0.05  # it does overlap
    sent, saved = sums(run, "wire/bytes_sent"), sums(run, "wire/bytes_saved")
    assert sent > 0
    assert (sent + saved) / sent >= 20
