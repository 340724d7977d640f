"""`python -m vlmrl inference=vllm`, with real servers on the CPU: it learns, on-policy and not, and survives deaths.

The two runs that learn take minutes each; they are what a release must show, and come last.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from support.command_line import SHORT, Home, summary
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


def until(holds: Callable[[], bool], what: str, seconds: float = STARTED_S) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.05)


def steps_of(run: Path) -> int:
    path = run / "metrics.jsonl"
    return max((line["step"] for line in read_metrics(path)), default=0) if path.exists() else 0


def engines(process: psutil.Process) -> list[psutil.Process]:
    """The API servers below a run."""
    return [
        child
        for child in process.children(recursive=True)
        if "vllm.entrypoints.openai.api_server" in child.cmdline()
        and "vlmrl.inference.vllm.in_server.supervisor" not in child.cmdline()
    ]


def sums(run: Path, key: str) -> float:
    lines = read_metrics(run / "metrics.jsonl")
    return float(sum(line.get(key, 0.0) + line.get(f"eval/{key}", 0.0) for line in lines))


def test_a_run_goes_on_when_one_of_its_two_servers_is_killed(home: Home) -> None:
    run = home.path / "outputs/one_of_two"
    process = home.start(
        *SHORT,
        "inference=vllm",
        "inference.replicas=2",
        "trainer.max_steps=40",
        "orchestrator.eval.every=20",
        f"hydra.run.dir={run}",
    )
    until(lambda: process.poll() is not None or steps_of(run) >= 3, "the third step")
    assert process.poll() is None, process.communicate()
    servers = engines(psutil.Process(process.pid))
    assert len(servers) == 2
    servers[0].send_signal(signal.SIGKILL)
    _, err = process.communicate(timeout=STARTED_S)
    assert (process.returncode, err) == (0, ""), err
    lines = read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in lines if line["step"]] == list(range(1, 41))
    assert all(line["rollouts/dropped"] == 0 for line in lines if line["step"])
    assert max(line["mismatch_kl/mean"] for line in lines if line["step"]) <= 1e-8
    assert any("restart 1 of" in warning for warning in summary(run)["warnings"])


def test_nothing_is_left_of_a_killed_run_and_it_resumes(home: Home) -> None:
    run = home.path / "outputs/killed_with_vllm"
    arguments = (*SHORT, "inference=vllm", "orchestrator.max_staleness=1", "trainer.max_steps=12")
    process = home.start(*arguments, f"hydra.run.dir={run}")
    until(lambda: process.poll() is not None or steps_of(run) >= 5, "the fifth step")
    assert process.poll() is None, process.communicate()
    below = psutil.Process(process.pid).children(recursive=True)
    assert engines(psutil.Process(process.pid))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    _, alive = psutil.wait_procs(below, timeout=60)
    assert alive == []
    recorded = {path.name for path in (run / "rollouts").iterdir()}
    assert {f"step_{step:06}.jsonl" for step in range(1, 5)} <= recorded

    ended = home.vlmrl(f"resume={run}")
    assert (ended.code, ended.err) == (0, "")
    lines = {line["step"]: line for line in read_metrics(run / "metrics.jsonl") if line["step"]}
    assert sorted(lines) == list(range(1, 13))
    assert max(line["staleness/max"] for line in lines.values()) == 1


@pytest.mark.parametrize("correction", ["none", "truncated"])
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
    versions = {v for r in read_rollouts(run / "rollouts/step_000006.jsonl") for t in r["turns"] for v in t["versions"]}
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


@pytest.mark.parametrize("staleness", [0, 2])
@pytest.mark.timeout(1800)
def test_the_task_is_learned(home: Home, staleness: int) -> None:
    run = home.path / f"outputs/learned_{staleness}"
    process = home.start(
        "inference=vllm",
        f"orchestrator.max_staleness={staleness}",
        "monitor.wandb.mode=disabled",
        f"hydra.run.dir={run}",
    )
    _, err = process.communicate(timeout=1700)
    assert (process.returncode, err) == (0, "")
    found = summary(run)
    assert found["exit_reason"] == "target_reached"
    assert min(found["eval/reward"], found["eval/reward_greedy"]) >= 0.95
    lines = [line for line in read_metrics(run / "metrics.jsonl") if line["step"]]
    assert max(line["staleness/max"] for line in lines) == staleness
    assert sum(line["rollouts/dropped"] for line in lines) == 0
    if staleness == 0:
        assert max(line["mismatch_kl/mean"] for line in lines) <= 1e-8
    else:
        assert min(line["time/engine_idle"] / line["time/step"] for line in lines) < 0.05  # it does overlap
    sent, saved = sums(run, "wire/bytes_sent"), sums(run, "wire/bytes_saved")
    assert sent > 0
    assert (sent + saved) / sent >= 20
