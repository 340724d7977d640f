"""A run on a data set of a hub, which is downloaded from HF_ENDPOINT; and the same run without the hub."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from support.command_line import PATIENCE, SHORT, Home
from support.loopback_hub import LoopbackHub

ROWS = "".join(json.dumps({"question": f"What is {n} + 1?", "answer": str(n + 1)}) + "\n" for n in range(40)).encode()


def run(home: Home, hub: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a new process: the server of processes has read HF_ENDPOINT already."""
    environment = home.environment | {"HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    arguments = arguments or ("task=dataset", "task.path=someone/sums", "reward=exact", *SHORT)
    command = [sys.executable, "-m", "vlmrl", *arguments]
    return subprocess.run(command, cwd=home.path, env=environment, capture_output=True, text=True, timeout=PATIENCE)


def test_a_hub_id_starts_a_run_and_a_dead_hub_is_one_sentence(tmp_path: Path) -> None:
    home = Home(tmp_path)
    with LoopbackHub() as hub:
        commit = hub.commit("someone/sums", {"data/train-00000-of-00001.jsonl": ROWS})
        ended = run(home, hub.url)
        assert ended.returncode == 0, ended.stderr
        log = next((home.path / "outputs").rglob("main.log")).read_text()
        assert f"someone/sums of the hub, revision {commit}" in log
    ended = run(home, hub.url)
    assert ended.returncode == 2
    assert f"task.path=someone/sums cannot be downloaded from {hub.url}" in ended.stderr


def test_a_resumed_run_reads_the_commit_that_it_began_with(tmp_path: Path) -> None:
    """Each set names its commit in summary.json, and only a new run reads what the branch points to now."""
    home = Home(tmp_path)
    sets = "orchestrator.eval.sets.ood"
    start = (
        *("task=mixture", "+task@task.tasks.sums=dataset", "task.tasks.sums.path=someone/sums", "reward=exact", *SHORT),
        *(f"+eval_set@{sets}=default", f"+task@{sets}.task=dataset", f"{sets}.task.path=someone/others"),
        *("trainer.max_steps=1", f"{sets}.problems=2", "hydra.run.dir=run", "monitor.report=false"),
    )
    with LoopbackHub() as hub:
        commits = {name: hub.commit(name, {"train.jsonl": ROWS}) for name in ("someone/sums", "someone/others")}
        ended = run(home, hub.url, *start)
        assert ended.returncode == 0, ended.stderr
        summary = json.loads((tmp_path / "run/summary.json").read_text())
        assert summary["hub_commits"] == commits
        assert commits["someone/sums"] in summary["data"]["sums rows"]
        assert commits["someone/others"] in summary["data"]["set ood, rows"]
        for name in commits:
            hub.commit(name, {"train.jsonl": ROWS.replace(b"What", b"Now")})
        ended = run(home, hub.url, "resume=run", "trainer.max_steps=2")
        assert ended.returncode == 0, ended.stderr
        resumed = json.loads((tmp_path / "run/summary.json").read_text())
        assert (resumed["step"], resumed["hub_commits"], resumed["data"]) == (2, commits, summary["data"])
