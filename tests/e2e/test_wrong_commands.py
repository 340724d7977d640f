"""Commands that cannot do what they say, by the real command: one sentence, exit code 1 or 2, and no folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from support.command_line import REPOSITORY, Ended, Home

pytestmark = pytest.mark.slow

BROKEN = """
import sys, time
from their_tasks import Sound

class Leaves(Sound):
    def __init__(self, config, *, seed):
        sys.exit(0)

class Raises(Sound):
    def __init__(self, config, *, seed):
        raise KeyError("column")

class Hangs(Sound):
    def __init__(self, config, *, seed):
        open("hanging", "w").close()
        while True:
            time.sleep(0.05)  # Python sees a signal that arrives just before a sleep only when the sleep has ended

class NoImage(Sound):
    def env(self, problem):
        from vlmrl import Image, Message
        env = super().env(problem)
        env.reset = lambda: (Message.of("user", "?", Image("/absent.png")),)
        return env
"""

CHECKS = (("dry_run=true",), ("mode=check",), ("trainer.max_steps=1",))


@dataclass(frozen=True)
class HomeWith(Home):
    """A home with other variables in its environment."""

    variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        return {**super().environment, **self.variables}


@pytest.fixture(scope="module")
def broken(home: Home) -> Home:
    (home.path / "their_broken_tasks.py").write_text(BROKEN)
    (home.path / "leaves_at_import.py").write_text("import sys; sys.exit(0)\n")
    return home


def refused(home: Home, *arguments: str) -> str:
    """The one line that the command ends with; it makes no folder."""
    before = sorted(home.path.iterdir())
    ended = home.vlmrl(*arguments)
    assert ended.code in (1, 2), ended.out + ended.err
    assert "Traceback" not in ended.err + ended.out
    assert ended.err.count("\n") == 1, ended.err
    after = [path for path in sorted(home.path.iterdir()) if path not in before and path.name != "__pycache__"]
    assert after == []
    return ended.err


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("leaves_at_import:T", "task.target=leaves_at_import:T: importing leaves_at_import:T raised SystemExit: 0 ("),
        ("their_broken_tasks:Leaves", "Leaves(config, seed=0) raised SystemExit: 0 ("),
        ("their_broken_tasks:Raises", "Raises(config, seed=0) raised KeyError: 'column' ("),
    ],
)
def test_a_task_that_cannot_be_made(target: str, message: str, broken: Home) -> None:
    for check in CHECKS[:2]:
        assert message in refused(broken, f"task={target}", *check, "algorithm.credit=episode")
    ended = broken.vlmrl(f"task={target}", "trainer.max_steps=1", "monitor.wandb.mode=disabled")
    assert ended.code in (1, 2)
    assert message in ended.err
    assert "Traceback" not in ended.err


def test_an_init_that_hangs_is_interrupted(broken: Home) -> None:
    for check in CHECKS[:2]:
        (broken.path / "hanging").unlink(missing_ok=True)
        process = broken.start("task=their_broken_tasks:Hangs", *check, "algorithm.credit=episode")
        while not (broken.path / "hanging").exists():
            assert process.poll() is None, process.communicate()
        process.send_signal(2)
        _, err = process.communicate(timeout=200)
        assert process.returncode == 1
        assert err.strip() == "interrupted"
    (broken.path / "hanging").unlink()


def test_a_plan_names_an_image_that_is_missing(broken: Home) -> None:
    message = refused(broken, "task=their_broken_tasks:NoImage", "dry_run=true", "algorithm.credit=episode")
    assert "none of its first 8 problems can be played (training problem 0: the image file /absent.png" in message


def test_a_plan_names_a_wrong_family(home: Home, tiny_folder: Path) -> None:
    message = refused(home, "model=qwen3vl_moe", f"model.name={tiny_folder}", "dry_run=true")
    assert "config.json says model_type=qwen3_vl, but model.vlm.family=qwen3_vl_moe" in message
    plan = home.vlmrl("model=qwen3vl", f"model.name={tiny_folder}", "dry_run=true")
    assert plan.code == 0, plan.err
    assert "cannot start here" not in plan.out, "0.4 M parameters need no GPU"
    assert "trainer.compile=null compiles no layer here" in plan.out


@pytest.mark.parametrize("cache", ["file", "/proc/x", "file/below"])
def test_a_cache_that_cannot_be_used(cache: str, home: Home, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    place = HomeWith(tmp_path, variables={"VLMRL_CACHE": cache if cache.startswith("/") else str(tmp_path / cache)})
    message = refused(place, "trainer.max_steps=1", "hydra.run.dir=outputs/here")
    assert f"{cache}, which cannot be used (" in message
    assert "set the variable VLMRL_CACHE to a folder" in message
    assert refused(place, "--multirun", "seed=0", "hydra.sweep.dir=outputs/here").startswith("error: in the job seed=0")


@pytest.mark.parametrize("safe", [{}, {"PYTHONSAFEPATH": "1"}])
def test_the_command_finds_tasks_in_the_current_folder(safe: dict[str, str], tmp_path: Path) -> None:
    """`vlmrl` is a script in the environment's bin/, which Python puts on the search path in place of the folder."""
    (tmp_path / "my_own_task.py").write_text((REPOSITORY / "vlmrl/cli/template/my_task.py").read_text())
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin/vlmrl"
    script.write_text("import sys\nfrom vlmrl.cli.main import main\nsys.exit(main())\n")
    command = [sys.executable, str(script), "mode=check", "task=my_own_task:MyTask"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), **safe}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_text_with_a_reference_is_kept(broken: Home) -> None:
    """In config.yaml, after a resume, and in a replay."""
    run = broken.path / "outputs/template"
    ended: Ended = broken.vlmrl(
        "task=their_tasks:Sound",
        r"task.args.template='\${name} is \${'",
        *(
            "trainer.warmup.steps=0",
            "trainer.max_steps=1",
            "orchestrator.groups_per_step=1",
            "orchestrator.group_size=2",
        ),
        *("orchestrator.eval.every=0", "algorithm.credit=episode", "monitor.wandb.mode=disabled"),
        *("monitor.report=true", f"hydra.run.dir={run}", "trainer.checkpoint_every=1"),
    )
    assert ended.code == 0, ended.err
    first = (run / "config.yaml").read_text()
    again = broken.vlmrl(f"++resume={run}", "trainer.max_steps=2")
    assert again.code == 0, again.err
    assert (run / "config.yaml").read_text() == first.replace("max_steps: 1\n", "max_steps: 2\n").replace(
        "resume: null", f"resume: {run}"
    )
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps[-2:] == [1, 2]
