"""A task that goes wrong at random in every place (support/fault_tasks.py) costs exactly the rollouts and
demonstrations in which it did: each is recorded with its reason, the run ends with exit code 0, and nothing is left."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from support import TESTS
from support.command_line import Ended, Home, Scenarios, steady_rollouts, summary
from vlmrl.record.faults import read_faults
from vlmrl.record.metrics import read_metrics

pytestmark = pytest.mark.slow

SIBLINGS = 4
RUN = (
    *("task=fault_tasks:Fuzzed", "task.max_turns=2", f"task.args.siblings={SIBLINGS}"),
    *("trainer.warmup.steps=6", "trainer.warmup.batch_size=8", "trainer.max_steps=12", "trainer.checkpoint_every=0"),
    *("orchestrator.groups_per_step=4", f"orchestrator.group_size={SIBLINGS}", "orchestrator.max_new_tokens=10"),
    *("orchestrator.eval.every=4", "orchestrator.eval.problems=8", "trainer.warmup.rl_weight=0.04"),
    *("monitor.wandb.mode=disabled", "monitor.report=true"),
)

MAIN = """
import json, os, sys, threading
from multiprocessing.synchronize import SemLock
import psutil
made, make_name = [], SemLock._make_name
SemLock._make_name = staticmethod(lambda: made.append(make_name()) or made[-1])
from vlmrl.cli.main import main
path = sys.argv.pop(1)
code = main()
me = psutil.Process()
left = {
    "threads": [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()],
    "processes": [child.cmdline() for child in me.children(recursive=True)],
    "pid": os.getpid(),
    "semaphores": ["sem." + name.lstrip("/") for name in made],
    "ports": [str(each.laddr) for each in me.net_connections() if each.status == "LISTEN"],
}
open(path, "w").write(json.dumps(left))
sys.exit(code)
"""
"""The command line, and then what is left of it in its process. Of the files in /dev/shm, a
semaphore's name does not have the process in it; the names of other files (torch, OpenMP) do."""


@pytest.fixture(scope="module")
def runs(home: Home) -> Scenarios:
    shutil.copy(TESTS / "support/fault_tasks.py", home.path)
    chosen = random.SystemRandom().randrange(10**6)  # it stands in config.yaml
    return Scenarios(few=lambda: fuzz(home, "few", 1, 0.02), many=lambda: fuzz(home, "many", chosen, 0.06))


def fuzz(home: Home, name: str, seed: int, rate: float) -> tuple[Path, Ended, dict[str, Any]]:
    """The run's folder, how it ended, and what it left."""
    run, temporary = home.path / "outputs" / name, home.path / f"tmp_{name}"
    temporary.mkdir()
    left = home.path / f"left_{name}.json"
    arguments = (f"task.args.seed={seed}", f"task.args.rate={rate}", f"task.args.injected={run}_injected")
    code = ("-c", f"import os, tempfile; os.environ['TMPDIR'] = tempfile.tempdir = {str(temporary)!r}\n" + MAIN)
    run.parent.mkdir(exist_ok=True)
    ended = home.vlmrl(str(left), *RUN, *arguments, f"hydra.run.dir={run}", code=code)
    found = json.loads(left.read_text())
    found["/tmp"] = sorted(path.name for path in temporary.iterdir())
    semaphores, pid = found.pop("semaphores"), found.pop("pid")
    shared = sorted(os.listdir("/dev/shm"))
    found["/dev/shm"] = [name for name in shared if name in semaphores or f"_{pid}_" in name]
    return run, ended, found


def injected(run: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(Path(f"{run}_injected").glob("*.json"))]


def key(fault: Any) -> tuple[Any, ...]:
    """What a fault must be recorded as. The index tells a demonstration, also one that joined an RL step."""
    return fault["split"], fault["problem_index"], fault["stop_reason"]


@pytest.mark.parametrize("name", ["few", "many"])
def test_what_was_recorded_is_what_went_wrong(name: str, runs: Scenarios) -> None:
    run, ended, _ = runs[name]
    assert (ended.code, ended.err) == (0, "")
    assert summary(run)["exit_reason"] == "finished"
    recorded = read_faults(run / "faults.jsonl")
    expected = Counter[tuple[Any, ...]]()
    for fault in injected(run):
        expected[key(fault)] += fault["times"]
    assert Counter(map(key, recorded)) == expected
    assert {fault["phase"] for fault in recorded} == {"supervised", "eval", "rl"}
    assert {fault["stop_reason"] for fault in recorded} == {"task_error", "image_error", "bad_reward"}
    assert all(fault["error"] for fault in recorded)

    of_rollouts = [record for records in steady_rollouts(run).values() for record in records if record["error"]]
    assert len(of_rollouts) == sum(not fault["rollout_id"].startswith("sft/") for fault in recorded)
    lines = read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(13))
    counted = sum(line.get("rollouts/dropped/fault", 0) for line in lines)
    assert counted == sum(fault["phase"] == "rl" and fault["rollout_id"].startswith("train") for fault in recorded)


def test_every_place_went_wrong(runs: Scenarios) -> None:
    places = {fault["place"] for name in ("few", "many") for fault in injected(runs[name][0])}
    calls = ("reset", "step", "demonstration")
    assert places == {
        *("problem", "id", "env", "reply", "reward", "metric", "metric name"),
        *calls,
        *(f"{what} of {call}" for what in ("messages", "image") for call in calls),
    }


@pytest.mark.parametrize("name", ["few", "many"])
def test_nothing_is_left(name: str, runs: Scenarios) -> None:
    _, _, left = runs[name]
    assert left == {"threads": [], "processes": [], "ports": [], "/tmp": [], "/dev/shm": []}
