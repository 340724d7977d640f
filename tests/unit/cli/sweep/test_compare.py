"""The table and the plot across runs whose metrics are known."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlmrl.cli.sweep.compare import COLUMNS, compare, compare_and_show, panels_of
from vlmrl.cli.sweep.curves import Curve, as_picture
from vlmrl.config.run import RunConfig
from vlmrl.record.run_dir import RunDir

HOSTILE = "<script>window.hacked = 1<img src=x onerror='alert(1)'>"

LINES = [
    {"step": 0, "eval/reward": 0.0, "eval/reward_greedy": 0.0, "time/elapsed": 5.0},
    {
        "step": 1,
        "reward/mean": 0.25,
        "throughput/tokens_per_s": 1000.0,
        "mismatch_kl/mean": 1e-13,
        "mismatch_kl/max": 4e-12,
        "time/elapsed": 6.0,
        "eval/reward": 0.96,
        "eval/reward_greedy": 1.0,
    },
    {
        "step": 2,
        "reward/mean": 0.5,
        "throughput/tokens_per_s": 3000.0,
        "mismatch_kl/mean": 3e-13,
        "mismatch_kl/max": 2e-12,
        "time/elapsed": 8.0,
        "eval/reward": 0.98,
        "eval/reward_greedy": 0.99,
    },
]


@pytest.fixture
def multirun(tmp_path: Path, run_config: Callable[..., RunConfig]) -> Path:
    """Three jobs: one at its target, one killed after a step, one that has not begun."""
    folder = tmp_path / "multirun"
    for seed, lines in enumerate([LINES, LINES[:2]]):
        run = RunDir(folder / f"seed={seed},trainer.max_steps=9")
        run.create()
        run.write_config(run_config("orchestrator.eval.target=0.95", "orchestrator.eval.consecutive=2"))
        run.write_overrides([f"seed={seed}", "trainer.max_steps=9"])
        run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
        if seed == 0:
            run.write_summary({"exit_reason": "target_reached", "wall_clock_s": 9.5, "objective": 0.98})
    (folder / "seed=2,trainer.max_steps=9").mkdir()
    (folder / "seed=0,trainer.max_steps=9/report.html").touch()
    return folder


def test_the_table(multirun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare_and_show([multirun], multirun)
    first, second, third = csv.DictReader(io.StringIO((multirun / "compare.csv").read_text()))
    assert first == {
        "job": "seed=0",
        "state": "finished",
        "step": "2",
        "eval/reward": "0.98",
        "eval/reward_greedy": "0.99",
        "reward/mean": "0.5",
        "seconds_to_target": "8.0",
        "seconds": "9.5",
        "throughput/tokens_per_s": "2000.0",
        "mismatch_kl/mean": "2e-13",
        "mismatch_kl/max": "4e-12",
    }
    assert (second["job"], second["state"], second["step"]) == ("seed=1", "killed", "1")
    assert second["seconds_to_target"] == "", "once is not twice in a row"
    assert second["seconds"] == "6.0"
    assert third == dict.fromkeys(COLUMNS, "") | {"job": "seed=2,trainer.max_steps=9", "state": "new"}
    text = (multirun / "compare.txt").read_text()
    assert capsys.readouterr().out.startswith(text)
    head, row = text.splitlines()[:2]
    assert head.split() == list(COLUMNS)
    assert " ".join(row.split()) == "seed=0 finished 2 0.980 0.990 0.500 8 10 2000 2.0e-13 4.0e-12"
    assert len({len(line) for line in text.splitlines()}) == 1, "columns line up"


def test_the_page_is_one_file_with_table_and_plot(multirun: Path) -> None:
    compare([multirun], multirun)
    html = (multirun / "compare.html").read_text()

    class Cells(HTMLParser):
        cells: list[str]

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.in_cell = tag in ("td", "a")

        def handle_data(self, data: str) -> None:
            if self.in_cell and data.strip():
                self.cells.append(data)

    parser = Cells()
    parser.cells = []
    parser.in_cell = False
    parser.feed(html)
    assert parser.cells[:3] == ["seed=0", "finished", "2"]
    assert len(parser.cells) == 3 * len(COLUMNS)
    assert 'href="seed=0,trainer.max_steps=9/report.html"' in html
    assert "src=" not in html.replace("-src ", ""), "nothing is loaded"
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html)
    held_out, greedy, training = json.loads(data)
    assert held_out["title"] == "held-out reward (sampled)"
    assert [(curve["name"], curve["seconds"], curve["values"]) for curve in held_out["runs"]] == [
        ("seed=0", [5.0, 6.0, 8.0], [0.0, 0.96, 0.98]),
        ("seed=1", [5.0, 6.0], [0.0, 0.96]),
    ], "a line per run that was evaluated"
    assert [curve["values"] for curve in greedy["runs"]] == [[0.0, 1.0, 0.99], [0.0, 1.0]]
    assert [curve["seconds"] for curve in training["runs"]] == [[6.0, 8.0], [6.0]], "training has no step 0"
    assert "uPlot" in html


@pytest.mark.chromium
@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium")
def test_the_page_draws_itself(multirun: Path) -> None:
    """In a browser, under the page's own content security policy, with a set of a hostile name."""
    with_set(multirun, HOSTILE)
    compare([multirun], multirun)
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom"]
    page = (multirun / "compare.html").as_uri()
    ended = subprocess.run([*command, page], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    drawn = ended.stdout[ended.stdout.index('id="plots"') :].partition("<script")[0]
    assert drawn.count("<canvas") == 4
    both = ["seed=0", "seed=1"]
    assert re.findall(r"seed=\d", drawn) == [*both, *both, "seed=0", *both], "the legends"
    assert HOSTILE.replace("<", "&lt;").replace(">", "&gt;") in drawn


def with_set(multirun: Path, name: str, score: str = "reward") -> None:
    """Give the evaluations of the first job a named set."""
    path = multirun / "seed=0,trainer.max_steps=9/metrics.jsonl"
    key = f"eval/{name}/{score}"
    lines = [line | {key: 0.25 * line["step"], f"{key}_se": 0.1} for line in LINES]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(("score", "title"), [("reward", "set ood"), ("reward_greedy", "set ood (greedy)")])
def test_a_named_set_has_curves_where_runs_have_it(multirun: Path, score: str, title: str) -> None:
    with_set(multirun, "ood", score)
    made = panels_of(compare([multirun], multirun))
    assert [panel.title for panel in made] == [
        *("held-out reward (sampled)", "held-out reward (greedy)", title, "training reward"),
    ]
    ((name, color, curve),) = made[2].lines
    assert (name, color) == ("seed=0", (68, 1, 84))
    assert curve == Curve((5.0, 6.0, 8.0), (0.0, 0.25, 0.5), (0.1, 0.1, 0.1))


def test_the_picture_has_a_band_of_the_standard_error(multirun: Path) -> None:
    """15 % of the run's color on white."""
    with_set(multirun, "ood")
    compare([multirun], multirun)
    picture = Image.open(multirun / "compare.png").convert("RGB")
    away = np.abs(np.asarray(picture).astype(int) - (227, 217, 232)).sum(-1)
    assert (away < 6).sum() > 1000


@pytest.mark.parametrize("name", ["_hidden", r"$\frac{", "图", HOSTILE, "long " * 60])
def test_any_name_can_be_drawn(multirun: Path, name: str) -> None:
    with_set(multirun, name)
    picture = Image.open(io.BytesIO(as_picture(panels_of(compare([multirun], multirun)))))
    assert picture.width < 3000


def test_runs_without_any_metric_have_a_picture() -> None:
    assert Image.open(io.BytesIO(as_picture([]))).width > 100


def test_without_matplotlib_the_picture_is_left_out(
    multirun: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compare_and_show([multirun], multirun)
    assert capsys.readouterr().out.endswith("compare.html, .png, .csv, .json, .txt\n")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    compare_and_show([multirun], multirun)
    assert "compare.png needs matplotlib: pip install 'vlmrl[plot]'" in capsys.readouterr().out
    assert sorted(path.name for path in multirun.glob("compare.*")) == [
        *("compare.csv", "compare.html", "compare.json", "compare.txt"),
    ]


def test_the_plot_has_a_line_per_run_that_was_evaluated(multirun: Path) -> None:
    compare([multirun], multirun)
    picture = Image.open(multirun / "compare.png").convert("RGB")
    # Of two evaluated runs out of three, the colours are the first two of viridis in three steps.
    colors = picture.getcolors(picture.width * picture.height) or []
    shown = {color for count, color in colors if count > 100}
    assert {(68, 1, 84), (33, 145, 140)} <= shown
    assert (253, 231, 37) not in shown, "the third has no line"


def test_single_runs_are_called_by_their_folders(multirun: Path, tmp_path: Path) -> None:
    one, other = sorted(multirun.glob("seed=*"))[:2]
    for run in (one, other):
        RunDir(run).overrides.unlink()
    rows = compare([one, other], tmp_path)
    assert [row.values["job"] for row in rows] == [one.name, other.name]


def test_a_run_that_deleted_rollouts_is_named(multirun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDir(multirun / "seed=0,trainer.max_steps=9")
    run.deleted_rollouts.write_text('{"max_rollouts_mib": 64, "step": 40, "eval": null}')
    compare_and_show([multirun], multirun)
    sentence = "seed=0 deleted the rollouts of the training steps up to 40, because monitor.max_rollouts_mib=64"
    assert sentence in capsys.readouterr().out.splitlines()
    assert sentence in (multirun / "compare.txt").read_text()
    assert f"<p>{sentence}</p>" in (multirun / "compare.html").read_text()
