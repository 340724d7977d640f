"""The HTML file: self-contained, written completely, without requests; and the process that writes it during a run."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path

import psutil
import pytest
from omegaconf import DictConfig

from support.configs import checked
from support.report_runs import noise, one_rollout, one_turn, record
from vlmrl.cli.main import main
from vlmrl.cli.past_runs import default_config
from vlmrl.config.run import RunConfig
from vlmrl.errors import ConfigError, VlmrlError
from vlmrl.monitor.report.background import ReportWriter
from vlmrl.monitor.report.page import FILES, SCRIPTS, html, temporary_of, write_report
from vlmrl.record.run_dir import RunDir

HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>{{data}}"


class Page(HTMLParser):
    """Collects scripts, styles and every address in the page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.scripts: list[str] = []
        self.data = ""
        self.policy = ""
        self.addresses: list[str] = []
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self._inside = tag if given.get("type") != "application/json" else "data"
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "action", "srcset")]
        if given.get("http-equiv") == "Content-Security-Policy":
            self.policy = given["content"] or ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts.append(data)
        elif self._inside == "data":
            self.data += data

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""


@pytest.fixture
def run_dir(tmp_path: Path, run_config: Callable[..., RunConfig]) -> RunDir:
    turn = one_turn(HOSTILE, noise(0, 8, 8), step=1, reward=1.0, advantage=1.0, question=HOSTILE)
    made = one_rollout("train", 1, 0, 0, [turn], problem=HOSTILE, error=HOSTILE)
    return record(tmp_path / "run", run_config(), [(1, [made])], names={97: HOSTILE})


def test_the_page_is_one_file_that_asks_for_nothing(run_dir: RunDir) -> None:
    write_report({HOSTILE: run_dir}, run_dir.report, default_config())
    page = Page(run_dir.report.read_text())
    assert page.addresses == []
    assert len(page.scripts) == len(SCRIPTS)
    digests = {base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in page.scripts}
    directives = dict(part.strip().split(" ", 1) for part in page.policy.split(";"))
    assert directives.keys() == {"default-src", "img-src", "style-src", "script-src"}
    assert directives["default-src"] == "'none'"
    assert directives["img-src"] == "data:"
    assert set(directives["script-src"].split()) == {f"'sha256-{digest}'" for digest in digests}


def test_the_data_is_that_of_the_run_whatever_its_texts_are(run_dir: RunDir) -> None:
    write_report({HOSTILE: run_dir}, run_dir.report, default_config())
    content = json.loads(Page(run_dir.report.read_text()).data)
    (shown,) = content["runs"][0]["rollouts"]
    assert (shown["problem"], shown["error"], shown["turns"][0]["text"]) == (HOSTILE, HOSTILE, HOSTILE)
    assert content["runs"][0]["name"] == HOSTILE
    assert content["defaults"]["trainer.packing"] == "tree"
    assert b"<script>window" not in run_dir.report.read_bytes()


def test_the_plotting_library_is_there_with_its_licence() -> None:
    page = html({"runs": [], "images": {}, "defaults": {}}).decode()
    version = re.search(r"uPlot (\d+\.\d+\.\d+) \(MIT", (FILES / "vendor/README.md").read_text())
    assert version is not None
    assert f"https://github.com/leeoniya/uPlot (v{version[1]})" in page
    assert "Permission is hereby granted, free of charge" in page


def test_a_page_that_cannot_be_written_leaves_the_old_one(run_dir: RunDir, tmp_path: Path) -> None:
    with pytest.raises(VlmrlError, match=r"gone/report\.html cannot be written"):
        write_report({"run": run_dir}, tmp_path / "gone/report.html", {})
    write_report({"run": run_dir}, run_dir.report, {})
    before = run_dir.report.read_bytes()
    run_dir.config.write_text("a: [")
    with pytest.raises(VlmrlError):
        write_report({"run": run_dir}, run_dir.report, {})
    assert run_dir.report.read_bytes() == before
    assert not list(run_dir.path.glob(".report*"))


# ── mode=report ─────────────────────────────────────────────────────────────────────────────────────────────


def test_the_command_writes_the_page_without_torch(run_dir: RunDir) -> None:
    script = (
        "import sys; from vlmrl.cli.main import main; code = main(sys.argv[1:]); "
        "sys.exit(code or ('torch' in sys.modules and 'torch was imported'))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script, "mode=report", f"run={run_dir.path}"],
        capture_output=True,
        text=True,
        # As during a run of several ranks: it must not wait for the other ranks.
        env={**os.environ, "RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"},
        timeout=120,
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, f"{run_dir.report}\n", "")
    assert HOSTILE in json.loads(Page(run_dir.report.read_text()).data)["runs"][0]["rollouts"][0]["problem"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "mode=report takes either run= or runs= and nothing else, and was given neither"),
        (["run=a", "seed=1"], "and nothing else, and was given run=a seed=1"),
        (["--multirun", "run=a"], "and nothing else"),
        (["run=nowhere"], r"run=.*nowhere holds no config\.yaml of a run"),
        (["runs=[nowhere]"], "nowhere is neither a run nor a multirun"),
    ],
)
def test_arguments_without_runs_are_refused(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["mode=report", *arguments]) == 2
    assert re.search(says, capsys.readouterr().err)


def test_a_single_run_cannot_be_compared(run_dir: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mode=report", f"runs=[{run_dir.path}]"]) == 2
    assert "names fewer than two runs, so nothing can be compared" in capsys.readouterr().err


def test_a_multirun_is_shown_by_what_its_jobs_differ_in(
    tmp_path: Path, run_config: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in (0, 1):
        record(tmp_path / f"seeds/seed={seed}", run_config(f"seed={seed}"), [])
    (tmp_path / "seeds/not_begun").mkdir()
    assert main(["mode=report", f"runs={tmp_path / 'seeds'}"]) == 0
    page = tmp_path / "seeds/side_by_side.html"
    assert capsys.readouterr().out == f"{page}\n"
    assert [run["name"] for run in json.loads(Page(page.read_text()).data)["runs"]] == ["seed=0", "seed=1"]


def test_a_config_cannot_ask_for_it(composed: Callable[..., DictConfig]) -> None:
    with pytest.raises(ConfigError, match="mode=report works on the command line only, next to run="):
        checked(composed("mode=report"))


# ── beside a run ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def held_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Processes that write a page wait at their start until this is called, however slow the machine is."""
    (tmp_path / "held").mkdir()
    (tmp_path / "held/sitecustomize.py").write_text(HELD)
    with (tmp_path / "held/gate").open("w") as gate:
        fcntl.flock(gate, fcntl.LOCK_EX)
        monkeypatch.setenv("GATE", gate.name)
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}/held{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        yield gate.close


HELD = """
import fcntl, os
with open(os.environ["GATE"]) as gate:
    fcntl.flock(gate, fcntl.LOCK_SH)
"""


def writers(run_dir: RunDir) -> list[psutil.Process]:
    """The processes that write the page of a run."""
    found = []
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):  # a child of another test, which has ended
            if f"run={run_dir.path}" in process.cmdline():
                found.append(process)
    return found


def test_the_page_is_written_in_the_background_and_again_at_the_end(
    run_dir: RunDir, held_back: Callable[[], None]
) -> None:
    writer = ReportWriter(run_dir)
    assert writer.start()
    (process,) = writers(run_dir)
    assert process.nice() > os.getpriority(os.PRIO_PROCESS, 0)
    assert os.getpgid(process.pid) != os.getpgid(0), "Ctrl-C in the terminal must reach only the run"
    assert os.getsid(process.pid) == os.getsid(0), "in another session, the priority would have no effect"
    assert writer.start(), "one at a time"
    assert writers(run_dir) == [process]
    held_back()
    assert writer.finish()
    assert HOSTILE in json.loads(Page(run_dir.report.read_text()).data)["runs"][0]["rollouts"][0]["problem"]
    assert run_dir.report_log.read_text() == f"{run_dir.report}\n"


def test_a_page_that_fails_is_reported_and_its_log_says_why(run_dir: RunDir) -> None:
    run_dir.config.write_text("a: [")
    writer = ReportWriter(run_dir)
    assert writer.start(), "not known yet"
    assert not writer.finish()
    assert "holds no config.yaml of a run" in run_dir.report_log.read_text()


@pytest.mark.usefixtures("held_back")
def test_a_page_that_hangs_does_not_keep_the_run_from_ending(run_dir: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmrl.monitor.report.background.REPORT_TIMEOUT_S", 0.01)
    writer = ReportWriter(run_dir)
    writer.start()
    hanging = writer._process
    assert hanging is not None
    hanging.send_signal(signal.SIGSTOP)
    half = temporary_of(run_dir.report, hanging.pid)
    half.write_bytes(b"half a page")
    assert not writer.finish()
    assert hanging.returncode == -signal.SIGKILL
    assert not half.exists()
    assert writer._process is not None
    assert writer._process.returncode == -signal.SIGKILL
