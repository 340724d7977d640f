"""vlmrl from its wheel, in a folder of the user's own, with conf, task, loss and advantage of theirs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

import vlmrl
from support.command_line import PATIENCE, REPOSITORY, SHORT

MINE = """
import PIL.Image

from vlmrl import Image, Message, Reply, Task


class Problem:
    def __init__(self, split, index):
        self.id = f"{split} {index}"
        self.shade = 7 * index % 256


class Env:
    def __init__(self, shade):
        self.shade = shade

    def reset(self):
        square = PIL.Image.new("RGB", (32, 32), (self.shade, 0, 0))
        return (Message.of("user", "Say anything. ", Image(square)),)

    def step(self, completion):
        return Reply(turn_reward=0.0, done=True, reward=min(1.0, len(completion) / 8))


class Shades(Task):
    def __init__(self, config, *, seed):
        assert config.args["level"] == 3, "from the user's own YAML"

    def problem(self, split, index):
        return Problem(split, index)

    def env(self, problem):
        return Env(problem.shade)

    def texts(self):
        return ("Say anything. ",)
"""
CONF = """
defaults:
  - imported
  - _self_
target: my_package.mine:Shades
args:
  level: 3
"""


@dataclass(frozen=True)
class Installed:
    """A place where packages are installed, and a folder of the user's elsewhere."""

    site: Path
    home: Path

    def run(self, *command: str, code: int = 0) -> str:
        """The output of a command in the user's folder. Nothing of the checkout is on its path."""
        environment = {
            **os.environ,
            "PYTHONPATH": str(self.site),
            "PATH": f"{self.site / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "VLMRL_CACHE": str(self.home / "cache"),
            "OMP_NUM_THREADS": "1",
        }
        ended = subprocess.run(
            command, cwd=self.home, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False
        )
        assert ended.returncode == code, ended.stderr
        return ended.stdout if code == 0 else ended.stderr

    def vlmrl(self, *arguments: str, code: int = 0) -> str:
        return self.run(sys.executable, "-m", "vlmrl", *arguments, code=code)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """A wheel built from a copy of the checkout, unpacked as pip does it."""
    pytest.importorskip("setuptools")
    if not (REPOSITORY / "pyproject.toml").exists():
        pytest.skip("not a checkout")
    root = tmp_path_factory.mktemp("installed")
    source, site, home = root / "source", root / "site", root / "home"
    for name in ("vlmrl", "conf", "sweeps"):
        shutil.copytree(REPOSITORY / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source / name)
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(root)], cwd=source, check=True, capture_output=True)
    (wheel,) = root.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    (site / "bin").mkdir()
    script = site / "bin/vlmrl"
    script.write_text(f"#!{sys.executable}\nimport sys\nfrom vlmrl.cli.main import main\nsys.exit(main())\n")
    script.chmod(0o755)
    (home / "my_package").mkdir(parents=True)
    (home / "my_package/mine.py").write_text(MINE)
    shutil.copy(REPOSITORY / "tests/support/their_losses.py", home / "my_package/losses.py")
    (home / "their_conf/task").mkdir(parents=True)
    (home / "their_conf/task/shades.yaml").write_text(CONF)
    return Installed(site, home)


def test_it_is_the_wheels(installed: Installed) -> None:
    found = installed.run(sys.executable, "-c", "import vlmrl; print(vlmrl.__file__)")
    assert found.strip() == str(installed.site / "vlmrl/__init__.py")
    assert "qwen3vl_tiny" in installed.vlmrl("--cfg", "job")
    assert installed.vlmrl("--version") == f"vlmrl {vlmrl.__version__}\n"
    sweep = installed.vlmrl("+sweep=seeds", "dry_run=true").splitlines()
    assert sum(line.startswith("job ") for line in sweep) == 5, "sweeps/ travels too"


OWN = (
    *("--config-dir", "their_conf", "task=shades"),
    *("algorithm=my_package.losses:scaled", "algorithm.advantage=my_package.losses:ranks", "algorithm.args.scale=0.5"),
    "algorithm.credit=episode",
)


def test_conf_task_loss_and_advantage_of_the_users_own(installed: Installed) -> None:
    assert "my_package.mine:Shades" in installed.vlmrl("dry_run=true", *OWN)
    explained = installed.vlmrl("explain", "task.args", *OWN)
    assert "their_conf/task/shades.yaml level=3" in " ".join(explained.split())
    installed.vlmrl(*OWN, *SHORT, "trainer.warmup.steps=0", "trainer.max_steps=2")
    lines = (installed.home / "outputs/latest/metrics.jsonl").read_text().splitlines()
    learned = [line for line in map(json.loads, lines) if line.get("loss") is not None]
    assert [line["mine/scale"] for line in learned] == [0.5, 0.5]
    said = installed.vlmrl("algorithm=my_package.losses:scald", code=2)
    assert "algorithm.loss=my_package.losses:scald names 'scald'" in said
    assert "it has scaled, ranks" in said


def test_init_writes_a_task_that_runs(installed: Installed) -> None:
    """The template travels in the wheel; what `init` writes passes its check and its tests, and learns."""
    assert "cd counting" in installed.vlmrl("init", "counting")
    home = installed.home / "counting"
    counting = Installed(installed.site, home)
    table = counting.run(sys.executable, "-m", "vlmrl.tasks.check", "counting:Counting", "args.level=3")
    assert {line.split()[0] for line in table.splitlines()} == {"ok"}
    assert counting.vlmrl("mode=check", "task=counting:Counting", "task.args.level=3") == table
    assert "2 passed" in counting.run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    assert not (home / "outputs").exists(), "none of these makes a run folder"
    counting.vlmrl("--config-dir", "conf", "experiment=counting", "trainer.max_steps=25", "monitor.wandb.mode=disabled")
    first, *_, last = map(json.loads, (home / "outputs/latest/metrics.jsonl").read_text().splitlines())
    assert first["eval/reward_greedy"] < 0.5 < 0.9 < last["eval/reward_greedy"], "it has learned to see"


def test_the_shell_completes(installed: Installed) -> None:
    """As bash calls it when the tab key is pressed."""

    def completed(line: str) -> list[str]:
        script = (
            'eval "$(vlmrl -sc install=bash)"; '
            f'COMP_LINE="{line}"; COMP_POINT={len(line)}; COMP_WORDS=($COMP_LINE); COMP_CWORD=1; '
            'hydra_bash_completion; printf "%s\\n" "${COMPREPLY[@]}"'
        )
        return installed.run("bash", "-c", script).split()

    assert "complete -o nospace -o default -F hydra_bash_completion vlmrl" in installed.run(
        "vlmrl", "-sc", "install=bash"
    )
    tasks = (
        *("clip_direction", "color_codeword", "dataset", "gymnasium", "imported", "mixture"),
        *("program", "small_print", "verifiers"),
    )
    assert completed("vlmrl task=") == [f"task={name}" for name in tasks]
    assert completed("vlmrl experiment=color_codeword_4") == ["experiment=color_codeword_4b"]
    assert completed("vlmrl trainer.learn") == ["trainer.learning_rate="]
