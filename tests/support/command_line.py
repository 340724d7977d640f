"""The real command in processes of its own, and what two runs must have in common.

A start takes seconds, most of them imports, so a test starts no more than it needs, and scenarios of several starts in
a row run side by side (`Scenarios`).
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, Unpack

from support.processes import Options, Process, start
from vlmrl.record.metrics import read_metrics
from vlmrl.record.rollouts import read_rollouts

T = TypeVar("T")

REPOSITORY = Path(__file__).parents[2]

SHORT = (
    "trainer.warmup.steps=10",
    "trainer.warmup.batch_size=16",
    "trainer.warmup.learning_rate=5e-3",  # ten steps, after which most answers end by themselves and rewards differ
    "trainer.max_steps=6",
    "trainer.checkpoint_every=2",
    "trainer.keep_checkpoints=3",
    "orchestrator.groups_per_step=2",
    "orchestrator.group_size=4",
    "orchestrator.eval.problems=8",
    "orchestrator.eval.every=2",
    "orchestrator.eval.target=0.95",
    "orchestrator.max_new_tokens=10",
    "trainer.max_grad_norm=0.3",
    "trainer.warmup.rl_weight=0.04",
    "monitor.wandb.mode=disabled",
    "monitor.report=false",
)
"""A whole run in about two seconds beside the start."""

KEYS = {
    "WANDB_API_KEY": "f4ce" * 10,
    "HF_TOKEN": "hf_" + "F4ce" * 8,
    "VLLM_API_KEY": "v11m" * 8,
}
"""What every command finds in its environment and must not write down; nobody's."""

VOLATILE = ("time/", "env/", "throughput/", "memory/")
"""What two equal runs may differ in."""

PATIENCE = 400.0
"""Seconds that a process may take before it counts as hanging: many times what it takes, for busy machines."""


def until(holds: Callable[[], bool], what: str, seconds: float = PATIENCE, pause_s: float = 0.005) -> None:
    """Return when `holds()` does. It is asked every `pause_s` seconds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"{what}: not within {seconds:.0f} s"
        time.sleep(pause_s)


AT_ONCE_S = 60.0
"""Seconds within which a run ends that waits for nothing; one that does wait comes to `PATIENCE`."""

KILL_AT = """
import os, signal, sys
event, name = sys.argv.pop(1), sys.argv.pop(1)
def hook(happens, arguments):
    if happens == event and name in str(arguments[0]):
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
from vlmrl.cli.main import main
sys.exit(main())
"""
"""The command line, killed right before a file operation: an audit event and a part of its path."""


@dataclass(frozen=True)
class Ended:
    """A process that ended."""

    code: int
    out: str
    err: str
    seconds: float


@dataclass(frozen=True)
class Home:
    """A user's own folder, with tasks of their own in it; the runs go there."""

    path: Path
    cache: Path | None = None
    """Where commands cache what they build; None: in a folder of `path`."""

    @property
    def environment(self) -> dict[str, str]:
        cache = self.cache or self.path / "cache"
        return {
            **os.environ,
            "PYTHONPATH": str(REPOSITORY),
            "VLMRL_CACHE": str(cache),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(cache.with_name("empty")),  # equal for homes that share a cache: see `READ_AT_IMPORT`
            **KEYS,
        }

    def start(self, *arguments: str, code: Sequence[str] = ("-m", "vlmrl"), **options: Unpack[Options]) -> Process:
        """`python -m vlmrl <arguments>`, running; `options` are those of `support.processes.start`."""
        return start(*code, *arguments, cwd=self.path, environment=self.environment, **options)

    def vlmrl(self, *arguments: str, code: Sequence[str] = ("-m", "vlmrl"), **options: Unpack[Options]) -> Ended:
        """`python -m vlmrl <arguments>`, ended."""
        started = time.monotonic()
        process = self.start(*arguments, code=code, **options)
        out, err = process.communicate(timeout=PATIENCE)
        return Ended(process.returncode, out, err, time.monotonic() - started)

    def made(self, name: str, *commands: tuple[str, ...]) -> Path:
        """The folder of a run that a first command starts and the others resume, each without a word on stderr."""
        run = self.path / "outputs" / name
        for number, arguments in enumerate(commands):
            ended = self.vlmrl(f"resume={run}" if number else f"hydra.run.dir={run}", *arguments)
            assert (ended.code, ended.err) == (0, ""), (arguments, ended)
        return run

    def copy(self, run: Path, name: str) -> Path:
        """A copy of a run's folder."""
        return Path(shutil.copytree(run, self.path / "outputs" / name))


@dataclass(frozen=True)
class Gate:
    """A place in a run where it waits for the test (`their_tasks.Gated`)."""

    folder: Path

    def arguments(self, problem: int) -> tuple[str, ...]:
        """Overrides that make the run wait at this training problem."""
        self.folder.mkdir(parents=True)
        return "task=their_tasks:Gated", "task.max_turns=2", "task.credit=turn", *self.again(problem)

    def again(self, problem: int) -> tuple[str, ...]:
        """Overrides that make a resumed run wait at another problem."""
        for name in ("reached", "open"):
            (self.folder / name).unlink(missing_ok=True)
        return f"task.args.hold={problem}", f"task.args.gate={self.folder}"

    def wait(self, is_running: Callable[[], bool]) -> None:
        """Return when the run waits there."""
        reached = self.folder / "reached"
        until(lambda: reached.exists() or not is_running(), "the run comes to its gate")
        assert reached.exists(), "the run ended before it came to its gate"

    def open(self) -> None:
        (self.folder / "open").touch()


class Scenarios:
    """Starts functions, two side by side; `[name]` is the result of one."""

    def __init__(self, **functions: Callable[[], Any]) -> None:
        pool = ThreadPoolExecutor(2)
        self._futures = {name: pool.submit(function) for name, function in functions.items()}
        pool.shutdown(wait=False)

    def __getitem__(self, name: str) -> Any:
        return self._futures[name].result()


def keys_found(run: Path) -> set[str]:
    """Names of the `KEYS` that stand in a file below the folder."""
    contents = [path.read_bytes() for path in run.rglob("*") if path.is_file()]
    return {name for name, key in KEYS.items() for content in contents if key.encode() in content}


# ── what a run left ─────────────────────────────────────────────────────────────────────────────────────────


def steady(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl or supervised.jsonl, without what depends on the clock and the machine."""
    return [{key: value for key, value in line.items() if not key.startswith(VOLATILE)} for line in read_metrics(path)]


def steady_rollouts(run: Path) -> dict[str, list[dict[str, Any]]]:
    """File name → records, without their seconds."""
    return {
        path.name: [{key: value for key, value in record.items() if key != "seconds"} for record in read_rollouts(path)]
        for path in sorted((run / "rollouts").iterdir())
    }


def summary(run: Path) -> dict[str, Any]:
    """summary.json."""
    content: dict[str, Any] = json.loads((run / "summary.json").read_bytes())
    return content


def assert_same_run(run: Path, never_stopped: Path) -> None:
    """Every figure and every rollout are equal, bit for bit."""
    for name in ("metrics.jsonl", "supervised.jsonl"):
        assert steady(run / name) == steady(never_stopped / name)
    assert steady_rollouts(run) == steady_rollouts(never_stopped)
    assert {path.name for path in (run / "images").iterdir()} == {
        path.name for path in (never_stopped / "images").iterdir()
    }
    assert summary(run)["exit_reason"] == "finished"
