"""Sections of report.html in a real Chromium: evaluation sets, reward terms, tasks of a mixture, data and bad rows.

Names and values are hostile: HTML, quotes, unicode, very long ones, and names of JavaScript's own.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from support.browser import Tab, in_chromium
from support.report_runs import config_of, noise, ordinary_rollout, record
from vlmrl.cli.past_runs import default_config
from vlmrl.monitor.report.page import write_report
from vlmrl.record.bad_rows import BadRowLog, BadRowRecord
from vlmrl.record.run_dir import RunDir
from vlmrl.record.step_log import Phase

pytestmark = in_chromium

HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"
# As `shown_value` writes them into keys: without slashes, in the order of their frequency.
VALUES = ["algebra", "10", "9", "図形", "(none)", "\"'`&lt;", "__proto__", "x" * 60, HOSTILE.replace("/", "∕")[:60]]
TERMS = ["math", "format", HOSTILE]
TASKS = ["geometry", "count \"'&", "ü" * 200]
IMAGE = noise(1, 12, 16)


def rising(step: int, top: float) -> float:
    return top * (1 - math.exp(-step / 4))


def metrics(step: int) -> dict[str, float]:
    found = {"reward/mean": rising(step, 0.8), "data/epoch": step / 3, "data/rows_seen": 64.0 * step}
    found |= {"data/bad_rows": float(step), "refill/sampled": 9.0 + step, "refill/discarded": float(step)}
    found |= {"refill/missing": 0.0, "curriculum/known": 8.0 * step, "curriculum/solved": 3.0 * step}
    found |= {f"reward/{name}": rising(step, 0.5) for name in TERMS}
    for name in TASKS:
        found |= {f"by_task/{name}/reward/mean": rising(step, 0.6), f"by_task/{name}/rollouts/total": 8.0}
    if step % 2 == 0:
        found |= {"eval/ood/reward": rising(step, 0.5), "eval/ood/reward_se": 0.03, "eval/ood/problems": 128.0}
        found |= {"eval/ood/reward_greedy": rising(step, 0.6), "eval/ood/truncated": 0.25, "eval/ood/faults": 3.0}
        found |= {f"eval/ood/pass@{k}": rising(step, 0.5 + k / 20) for k in (1, 2, 8)} | {"eval/ood/pass@8_se": 0.02}
        found |= {"eval/ood/maj@8": 0.5, "eval/图.v-2/reward_greedy": 0.4, "eval/图.v-2/problems": 60.0}
        found |= {f"eval/ood/by/a column/{value}": (i + 1) / 10 for i, value in enumerate(VALUES)}
        found |= {f"eval/reward/{name}": 0.4 for name in TERMS}
    return found


def bad_row(index: int, reason: str, source: str = "", phase: Phase = "rl") -> BadRowRecord:
    row = 17 * index + 3 if source else None
    return {
        "step": index,
        "phase": phase,
        "split": "train",
        "index": index,
        "source": source,
        "row": row,
        "reason": reason,
    }


def made(path: Path, *, seed: int) -> RunDir:
    run = record(
        path,
        config_of("orchestrator.groups_per_step=1", "orchestrator.group_size=2", f"seed={seed}"),
        [(step, [ordinary_rollout("train", step, 0, index, [IMAGE]) for index in range(2)]) for step in range(1, 9)],
        metrics=metrics,
    )
    rows = [bad_row(index, f"the image {index} is missing", "rows.parquet") for index in range(1, 9)]
    BadRowLog(run.bad_rows).write([bad_row(1, f"{HOSTILE}\n{'y' * 9000}", HOSTILE, "supervised"), *rows])
    return run


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    run = made(tmp_path_factory.mktemp("sections") / "one", seed=1)
    write_report({run.name: run}, run.report, default_config())
    return run


def legend(tab: Tab, part: str, title: str) -> list[list[str]]:
    """The lines of a chart that are shown, each with its value."""
    box = tab.page.locator(f'[data-part="{part}"] .chart', has=tab.page.get_by_role("heading", name=title, exact=True))
    return [text.split("\n") for text in box.locator('.legend [aria-pressed="true"]').all_inner_texts()]


def table(tab: Tab, selector: str) -> list[list[str]]:
    return [text.split("\t") for text in tab.page.locator(f"{selector} tbody tr").all_inner_texts()]


def test_evaluation_sets_have_charts_and_a_table(browser: Any, run_dir: RunDir) -> None:
    with Tab(browser, run_dir.report) as tab:
        newest = rising(8, 0.5)
        assert legend(tab, "Evaluation sets", "Reward by set") == [
            ["ood", f"{newest:.4g} ± 0.03"],
            ["图.v-2, greedy", "0.4"],
        ]
        assert legend(tab, "Evaluation sets", "ood") == [
            ["avg@8", f"{newest:.4g} ± 0.03"],
            ["greedy", f"{rising(8, 0.6):.4g}"],
            ["pass@8", f"{rising(8, 0.9):.4g} ± 0.02"],
            ["maj@8", "0.5"],
        ]
        rows = table(tab, ".sets")
        assert rows[0] == [
            *("ood", "128", f"{newest:.3g} ± 0.03", f"{rising(8, 0.6):.3g}"),
            *(f"pass@8 {rising(8, 0.9):.3g} ± 0.02", "maj@8 0.5", "25 %", "3"),
        ]
        assert rows[1] == ["图.v-2", "60", "–", "0.4", "–", "–", "–", "0"]
        hidden = tab.page.get_by_role("button", name="pass@2")
        assert hidden.get_attribute("aria-pressed") == "false"
        hidden.click()
        assert ["pass@2", f"{rising(8, 0.6):.4g}"] in legend(tab, "Evaluation sets", "ood")


def test_results_by_column_are_a_table_in_the_order_of_the_metrics(browser: Any, run_dir: RunDir) -> None:
    with Tab(browser, run_dir.report) as tab:
        rows = table(tab, '.by[data-column="a column"]')
        assert [row[0] for row in rows] == VALUES, "also numbers, which JavaScript would sort"
        assert [row[2] for row in rows] == [f"{(i + 1) / 10:.3g}" for i in range(len(VALUES))]
        widths = tab.page.locator(".by .share i").evaluate_all("all => all.map(each => each.clientWidth)")
        assert widths == sorted(widths), "a larger reward has a longer bar"
        assert widths[0] < widths[-1]


def test_terms_tasks_and_data_have_charts(browser: Any, run_dir: RunDir) -> None:
    with Tab(browser, run_dir.report) as tab:
        term, task = f"{rising(8, 0.5):.4g}", f"{rising(8, 0.6):.4g}"
        assert legend(tab, "Reward terms", "Reward terms, training") == [[name, term] for name in TERMS]
        assert legend(tab, "Reward terms", "Reward terms, held-out, sampled") == [[name, "0.4"] for name in TERMS]
        assert legend(tab, "Tasks of the mixture", "Reward by task, training") == [[name, task] for name in TASKS]
        assert legend(tab, "Data", "Groups sampled by refill") == [
            ["played", "17"],
            ["thrown away", "8"],
            ["missing", "0"],
        ]
        assert legend(tab, "Data", "Curriculum") == [["with a pass rate", "64"], ["solved", "24"]]
        assert legend(tab, "Data", "Bad rows found") == [["of the training data", "8"]]
        more = " ".join(tab.texts(".more summary"))
        tab.page.get_by_text("more metrics").click()
        tab.page.wait_for_selector(".more .chart", state="attached")
        others = tab.texts(".more .chart h3")
        assert more.startswith(f"{len(others)} more")
        shown_above = ("eval/ood", "reward/", "eval/reward/", "refill/", "curriculum/", "data/")
        assert [key for key in others if key.startswith(shown_above)] == ["reward/std"]


def test_bad_rows_are_a_table_by_reason(browser: Any, run_dir: RunDir) -> None:
    with Tab(browser, run_dir.report) as tab:
        assert tab.texts(".badrows caption")[0].startswith("Bad rows")
        assert "9 rows left out, 2 reasons" in tab.texts(".badrows caption")[0]
        (often, reason, places), (once, long, place) = table(tab, ".badrows")
        assert (often, reason) == ("8", "the image 1 is missing")
        assert places.split("\n")[1] == "rows.parquet row 20 step 1"
        assert places.endswith("and 3 more in bad_rows.jsonl")
        assert once == "1"
        assert HOSTILE in long
        assert 400 < len(long) < 600, "a reason may quote a whole file"
        assert place.strip() == f"{HOSTILE} row 20 supervised step 1"


def test_a_name_has_one_colour_on_the_page(browser: Any, run_dir: RunDir) -> None:
    """A set has the same dot everywhere, a term and a task the same line, and no two lines of a chart the same."""
    with Tab(browser, run_dir.report) as tab:
        found = tab.page.evaluate(
            """() => [...document.querySelectorAll(".part .legend button")].map(each => [
                each.closest(".chart").dataset.title, each.children[1].innerText, each.children[0].style.background])"""
        )
        named = {name: {colour for _, own, colour in found if own == name} for name in (*TERMS, *TASKS)}
        assert {len(colours) for colours in named.values()} == {1}
        for title in ("Reward by set", "Reward terms, training", "Reward by task, training"):
            colours = [colour for own, _, colour in found if own == title]
            assert len(set(colours)) == len(colours) > 1
        dots = tab.page.evaluate(
            """() => [".chart[data-title=ood] .dot", ".sets tr[data-set=ood] .dot", ".by[data-set=ood] .dot"].map(
                each => document.querySelector(each).style.background)"""
        )
        assert dots == [next(colour for title, name, colour in found if (title, name) == ("Reward by set", "ood"))] * 3


def test_values_of_few_steps_have_points(browser: Any, run_dir: RunDir) -> None:
    """Where no two neighbours have a value, a line alone draws nothing; a gap in a whole curve needs no points."""
    with Tab(browser, run_dir.report) as tab:
        wanted = {"[0, null, 1, null, 2]": True, "[5]": True, "[1, 2, 3, null, 4, null, 5, 6]": False, "[null]": False}
        assert {values: tab.page.evaluate(f"sparse({values})") for values in wanted} == wanted


def test_names_are_texts(browser: Any, run_dir: RunDir) -> None:
    with Tab(browser, run_dir.report) as tab:
        assert tab.page.evaluate("window.hacked") is None
        assert tab.page.locator("img[src=x]").count() == 0
        assert HOSTILE in tab.page.locator('[data-part="Reward terms"] .legend').first.inner_text()


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1440, 390])
def test_nothing_is_wider_than_the_window(
    browser: Any, run_dir: RunDir, tmp_path: Path, width: int, theme: str
) -> None:
    """On a phone too: long names wrap or are cut, tables scroll by themselves, and no legend leaves its chart."""
    with Tab(browser, run_dir.report, width=width, theme=theme) as tab:
        assert tab.page.evaluate("document.documentElement.scrollWidth") <= width
        outside = tab.page.evaluate(
            """() => [...document.querySelectorAll(".chart")].filter(box => [...box.querySelectorAll(
                ".legend button, h3, canvas")].some(each => each.getBoundingClientRect().right
                > box.getBoundingClientRect().right + 1)).map(box => box.dataset.title)"""
        )
        assert outside == []
        path = Path(os.environ.get("REPORT_SCREENSHOTS") or tmp_path) / f"sections_{theme}_{width}.png"
        tab.page.screenshot(path=path, full_page=True)
    with PIL.Image.open(path) as picture:
        assert np.asarray(picture.convert("L")).std() > 5


def test_several_runs_have_a_line_each(browser: Any, run_dir: RunDir, tmp_path: Path) -> None:
    other = made(tmp_path / "two", seed=2)
    page = tmp_path / "both.html"
    write_report({"one": run_dir, HOSTILE: other}, page, default_config())
    with Tab(browser, page) as tab:
        newest = f"{rising(8, 0.5):.4g}"
        lines = legend(tab, "Evaluation sets", "ood: avg@8")
        assert lines == [["one", f"{newest} ± 0.03"], [HOSTILE, f"{newest} ± 0.03"]]
        assert legend(tab, "Reward terms", "math: training") == [["one", newest], [HOSTILE, newest]]
        assert [row[0] for row in table(tab, ".sets")] == [
            *("ood · one", "图.v-2 · one", f"ood · {HOSTILE}", f"图.v-2 · {HOSTILE}"),
        ]
        assert table(tab, ".by")[0] == [VALUES[0], "0.1", "0.1"]
        assert tab.page.locator(".badrows").count() == 2
        assert tab.page.evaluate("document.documentElement.scrollWidth") <= 1440
        assert tab.page.evaluate("window.hacked") is None
