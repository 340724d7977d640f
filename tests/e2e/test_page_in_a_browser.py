"""report.html in a real Chromium: of a real run, of a synthetic run with 2,000 rollouts, and of two runs side by side.

If REPORT_SCREENSHOTS names a folder, the screenshots (two widths, both themes) are kept there.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from support.browser import Tab, in_chromium
from support.report_runs import config_of, noise, one_rollout, one_turn, ordinary_rollout, record
from vlmrl.cli.main import main
from vlmrl.cli.past_runs import default_config
from vlmrl.monitor.report.page import write_report
from vlmrl.record.metrics import MetricsLog, read_metrics
from vlmrl.record.rollouts import RolloutRecord, RolloutRecorder, read_rollouts
from vlmrl.record.run_dir import RunDir
from vlmrl.types import DropReason, Rollout, StopReason

pytestmark = in_chromium

HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"
IMAGES = [noise(seed, 12, 16) for seed in range(4)]
LARGE = noise(9, 600, 900)
WIDTHS = (1440, 720)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run with more than 2,000 rollouts: 40 steps of 3 groups of 16, evaluations, several drop reasons."""
    config = config_of(
        "orchestrator.groups_per_step=3", "orchestrator.group_size=16", "orchestrator.eval.problems=20", "seed=7"
    )

    def group(step: int, number: int) -> list[Rollout]:
        rollouts = [ordinary_rollout("train", step, number, index, [*IMAGES, LARGE]) for index in range(16)]
        if (step, number) == (40, 0):
            hostile = one_turn(
                HOSTILE, IMAGES[0], step=step, reward=1.0, advantage=2.0, question=HOSTILE, ids=[97, 98, 60, 98, 62]
            )
            rollouts[3] = one_rollout("train", step, number, 3, [hostile], problem=HOSTILE, error=HOSTILE)
        if (step, number) == (40, 1):
            old = one_turn("old", IMAGES[1], step=step, reward=0.25, advantage=0.0)
            rollouts[5] = one_rollout("train", step, number, 5, [old], dropped=DropReason.STALE)
            rollouts[6] = one_rollout(
                "train", step, number, 6, [], stop=StopReason.IMAGE_ERROR, dropped=DropReason.FAULT, error="no PNG"
            )
        return rollouts

    def evaluated(label: str, step: int) -> list[Rollout]:
        return [ordinary_rollout(label, step, problem, 0, IMAGES) for problem in range(20)]

    return record(
        tmp_path_factory.mktemp("made") / "made run",
        config,
        [(step, [rollout for number in range(3) for rollout in group(step, number)]) for step in range(1, 41)],
        [(step, evaluated("eval", step), evaluated("eval-greedy", step)) for step in range(10, 41, 10)],
        names={98: HOSTILE, 60: "<b>", 62: "\n"},
        summary={"exit_reason": "error", "error": HOSTILE, "wall_clock_s": 61.0, "warnings": [HOSTILE]},
        metrics=lambda step: {"reward/mean": step / 40, "mismatch_kl/max": 10.0**-step, "task/thing": float(step)},
    )


@pytest.fixture(scope="module")
def made_page(made: RunDir) -> Path:
    write_report({made.name: made}, made.report, default_config())
    return made.report


def recorded(run_dir: RunDir) -> dict[str, RolloutRecord]:
    return {
        each["rollout_id"]: each for path in sorted(run_dir.rollouts.glob("*.parquet")) for each in read_rollouts(path)
    }


# ── a real run ──────────────────────────────────────────────────────────────────────────────────────────────


def test_the_page_of_a_real_run(browser: Any, never_stopped: Path) -> None:
    """The run wrote the page. It has every rollout, and its images equal those of the run, pixel by pixel."""
    run_dir = RunDir(never_stopped)
    records = recorded(run_dir)
    with Tab(browser, run_dir.report) as tab:
        assert tab.texts(".runline .pill") == ["finished"]
        last = read_metrics(run_dir.metrics)[-1]
        assert f"{last['eval/reward']:.3g}" == f"{float(tab.texts('.tile b')[0]):.3g}"
        tab.page.get_by_role("tab", name="Rollouts").click()
        assert sorted(tab.shown()) == sorted(records)
        for rollout_id in [min(records), "train/000006/01/03"]:
            tab.open(rollout_id)
            turns = records[rollout_id]["turns"]
            hashes = [
                p["hash"] for turn in turns for message in turn["messages"] for p in message["content"] if "hash" in p
            ]
            assert_pictures(tab, run_dir, [hash for hash in hashes if hash])
            assert "".join(tab.texts(".sampled")) == spelled(run_dir, turns)
            assert len(hashes) == 2 * len(turns)


def spelled(run_dir: RunDir, turns: list[Any]) -> str:
    lines = [json.loads(line) for line in run_dir.tokens.read_text().splitlines()]
    spelling = {line["id"]: line["text"].strip() for line in lines}
    return "".join(spelling[id] for turn in turns for id in turn["completion_ids"])


def assert_pictures(tab: Tab, run_dir: RunDir, hashes: list[str]) -> None:
    """Check that the conversation shows these images, as the browser decodes them."""
    images = tab.page.locator(".message img")
    assert images.evaluate_all("all => all.map(each => each.dataset.hash)") == hashes
    for place, hash in enumerate(hashes):
        size, pixels = images.nth(place).evaluate(
            """async (image) => {
                await image.decode();
                const canvas = document.createElement("canvas");
                [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
                const context = canvas.getContext("2d");
                context.drawImage(image, 0, 0);
                const data = context.getImageData(0, 0, canvas.width, canvas.height).data;
                return [[canvas.height, canvas.width], [...data]];
            }"""
        )
        with PIL.Image.open(run_dir.image(hash)) as picture:
            wanted = np.asarray(picture.convert("RGB"))
        found = np.array(pixels, np.uint8).reshape(*size, 4)[..., :3]
        assert np.array_equal(found, wanted), f"image {hash} differs on the page"


# ── 2,000 rollouts ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("place", ["#curves", "#rollouts"])
def test_it_opens_within_two_seconds(browser: Any, made_page: Path, place: str) -> None:
    with Tab(browser, made_page, place) as tab:
        assert len(tab.page.evaluate("all.length ? all : RUNS[0].rollouts")) >= 2000
        print(f"{place}: {tab.ready_ms:.0f} ms")
        assert tab.ready_ms < 2000


def test_small_pictures_are_shown_pixel_by_pixel(browser: Any, made: RunDir, made_page: Path) -> None:
    with Tab(browser, made_page, "#rollouts") as tab:
        tab.fill("Group, problem or text", "train/000040/02")
        tab.open("train/000040/02/00")
        images = tab.page.locator(".message img")
        assert_pictures(tab, made, [IMAGES[2].hash, IMAGES[3].hash])
        assert images.first.evaluate("image => getComputedStyle(image).imageRendering") == "pixelated"
        assert images.first.bounding_box()["width"] == 16 * 4
        tab.open("train/000040/02/01")
        tab.page.keyboard.press("m")
        assert tab.texts(".placeholder small") == ["<|image_pad|> × 3"] * 2
        assert tab.page.locator(".placeholder img").count() == 2
        assert "position" in hover(tab, ".token.prompt")


def hover(tab: Tab, selector: str) -> dict[str, str]:
    tab.page.locator(selector).first.hover()
    return dict(zip(tab.texts("#tip dt"), tab.texts("#tip dd"), strict=True))


FILTERS: list[tuple[Callable[[Tab], object], Callable[[RolloutRecord], bool]]] = [
    (lambda tab: tab.fill("Step from", "39", "Step to", "39"), lambda r: r["step"] == 39),
    (lambda tab: tab.fill("Reward from", "0.6", "Reward to", "0.8"), lambda r: 0.6 <= r["reward"] <= 0.8),
    (
        lambda tab: tab.page.get_by_label("Stop reason", exact=True).select_option("image_error"),
        lambda r: r["stop_reason"] == "image_error",
    ),
    (
        lambda tab: tab.page.get_by_label("Dropped", exact=True).select_option("dropped"),
        lambda r: r["dropped"] is not None,
    ),
    (
        lambda tab: tab.page.get_by_label("Dropped", exact=True).select_option("stale"),
        lambda r: r["dropped"] == "stale",
    ),
    (
        lambda tab: tab.fill("Group, problem or text", "train/000040/01"),
        lambda r: "train/000040/01/" in r["rollout_id"],
    ),
    (lambda tab: tab.fill("Group, problem or text", "PROBLEM 2"), lambda r: r["problem_id"].startswith("problem 2")),
    (lambda tab: tab.page.get_by_role("radio", name="greedy").click(), lambda r: r["split"] == "eval_greedy"),
]


def test_filters(browser: Any, made: RunDir, made_page: Path) -> None:
    records = recorded(made)
    with Tab(browser, made_page, "#rollouts") as tab:
        everything = tab.shown()
        assert len(everything) >= 2000
        assert tab.texts(".count") == [f"{len(everything):,} of {len(everything):,}"]
        for use, wanted in FILTERS:
            use(tab)
            expected = {rollout_id for rollout_id in everything if wanted(records[rollout_id])}
            assert set(tab.shown()) == expected
            assert 0 < len(expected) < len(everything)
            assert tab.texts(".count") == [f"{len(expected):,} of {len(everything):,}"]
            chosen = tab.page.locator(".cell[aria-current]")
            assert (chosen.get_attribute("aria-label") or "").split(":")[0] in expected, "what is shown matches"
            tab.page.get_by_role("button", name="Clear").click()
            assert tab.shown() == everything
        tab.fill("Group, problem or text", "no such thing")
        assert tab.texts(".groups .empty") == ["No rollout matches."]
        note = " ".join(tab.texts(".sample"))
        assert note.startswith(f"{len(everything):,} of {40 * 48 + 4 * 40:,} rollouts")


def test_evaluation_sets_stand_apart(browser: Any, tmp_path: Path) -> None:
    """The third problem of a set is another one than the third of the main evaluation."""
    run_dir = record(tmp_path / "sets", config_of("orchestrator.eval.problems=3"), [])
    labels = {"eval_sampled": "eval", "eval_greedy": "eval-greedy", "eval_ood_sampled": "eval_ood"}
    labels["eval_ood_greedy"] = "eval_ood-greedy"
    recorder = RolloutRecorder(run_dir)
    recorder.write(
        1,
        {
            split: [ordinary_rollout(label, 1, problem, 0, IMAGES) for problem in range(3)]
            for split, label in labels.items()
        },
    )
    recorder.close()
    assert main(["mode=report", f"run={run_dir.path}"]) == 0
    with Tab(browser, run_dir.report, "#rollouts") as tab:
        keys = tab.page.locator(".group").evaluate_all("all => all.map(each => each.dataset.key)")
        assert keys == [f"held-out{name}/0{problem}" for name in (" ood", "") for problem in range(3)]
        tab.page.get_by_title("Held-out problems, greedy").click()
        assert {id.split("/")[0] for id in tab.shown()} == {"eval-greedy", "eval_ood-greedy"}


def test_a_run_that_learns_from_pairs_has_their_curves(browser: Any, tmp_path: Path) -> None:
    """Its steps have no rollouts, so no time in which they were sampled."""
    run_dir = record(tmp_path / "pairs", config_of("mode=dpo", "dpo.from_run=outputs/a"), [])
    log = MetricsLog(run_dir.metrics)
    for step in range(1, 9):
        times = {"time/step": 2.0, "time/train": 1.5}
        log.write({"step": step, "loss": 1 / step, "dpo/accuracy": 0.5, "dpo/margin": 0.1 * step, **times})
    log.close()
    assert main(["mode=report", f"run={run_dir.path}"]) == 0
    with Tab(browser, run_dir.report, "#curves") as tab:
        titles = tab.page.locator("h3").all_inner_texts()
        assert {"Pairs with the better answer ahead", "Implicit rewards of pairs", "Loss", "Time per step"} <= {*titles}


def test_a_dropped_rollout_says_why(browser: Any, made_page: Path) -> None:
    with Tab(browser, made_page, "#rollouts") as tab:
        tab.open("train/000040/01/05")
        assert tab.texts(".detail .title .pill") == ["dropped: stale"]
        assert tab.texts(".detail .note") == ["Not trained on: a token is older than orchestrator.max_staleness."]
        assert tab.page.locator(".token.loss").count() == 0
        assert tab.page.locator(".token.sampled").count() == 3
        tab.open("train/000040/01/06")
        assert tab.texts(".detail .note") == ["Not trained on: its stop reason is a fault.", "no PNG"]
        tab.open("train/000040/01/07")
        assert tab.page.locator(".token.loss").count() == tab.page.locator(".token.sampled").count() > 0


def test_the_colour_follows_the_chosen_value(browser: Any, made: RunDir, made_page: Path) -> None:
    shown = recorded(made)["train/000040/02/01"]

    def per_token(of: Callable[[Any, int], float]) -> list[float]:
        return [of(turn, i) for turn in shown["turns"] for i in range(len(turn["completion_ids"]))]

    wanted = {
        "gap": per_token(
            lambda turn, i: float(np.float32(turn["trainer_logprobs"][i])) - float(np.float32(turn["logprobs"][i]))
        ),
        "advantage": per_token(lambda turn, i: turn["advantage"]),
        "entropy": per_token(lambda turn, i: turn["entropies"][i]),
        "surprise": per_token(lambda turn, i: -turn["logprobs"][i]),
        "version": per_token(lambda turn, i: turn["versions"][i]),
    }
    with Tab(browser, made_page, "#rollouts") as tab:
        tab.open("train/000040/02/01")
        looks = {}
        for name, figures in wanted.items():
            tab.page.get_by_role("radio", name=name, exact=True).click()
            read = tab.page.locator(".sampled").evaluate_all(
                """tokens => tokens.map(token => [
                    Number(token.dataset.value), token.style.getPropertyValue("--tint"),
                    parseFloat(token.style.getPropertyValue("--strength"))])"""
            )
            assert [value for value, *_ in read] == pytest.approx(figures, rel=1e-5, abs=1e-7)
            looks[name] = [(colour, strength) for _, colour, strength in read]
            if name in ("gap", "advantage"):
                for value, (colour, _) in zip(figures, looks[name], strict=True):
                    assert colour == ("var(--below)" if value < 0 else "var(--above)")
            if name != "version":
                order = np.argsort(np.abs(figures), kind="stable")
                strengths = [looks[name][place][1] for place in order]
                assert strengths == sorted(strengths), "a larger value has a stronger colour"
                assert strengths[-1] > strengths[0]
        assert len({str(each) for each in looks.values()}) == len(looks)
        backgrounds = tab.page.locator(".sampled").evaluate_all(
            "tokens => tokens.map(token => getComputedStyle(token).backgroundColor)"
        )
        tab.page.get_by_role("radio", name="none", exact=True).click()
        tab.page.wait_for_timeout(300)
        plain = tab.page.locator(".sampled").evaluate_all(
            "tokens => tokens.map(token => getComputedStyle(token).backgroundColor)"
        )
        assert all(one != other for one, other in zip(backgrounds, plain, strict=True)), "it is seen"
        tip = hover(tab, ".sampled")
        assert float(tip["engine logprob"].replace("−", "-")) == pytest.approx(
            shown["turns"][0]["logprobs"][0], rel=1e-4
        )
        assert tip["loss"] == "yes"


def test_siblings_stand_side_by_side(browser: Any, made_page: Path) -> None:
    with Tab(browser, made_page, "#rollouts") as tab:
        tab.open("train/000040/02/00")
        tab.page.get_by_role("button", name="Siblings").click()
        assert tab.page.locator(".card").count() == 16
        rewards = [float(text) for text in tab.texts(".card header b")]
        assert rewards == sorted(rewards, reverse=True)
        assert tab.page.locator(".detail > .turn").count() == 1, "the prompt that they share, once"
        tab.page.get_by_role("button", name="05", exact=True).click()
        assert tab.texts(".detail .title h2") == ["train/000040/02/05"]


def test_values_under_the_cursor(browser: Any, made: RunDir, made_page: Path) -> None:
    with Tab(browser, made_page) as tab:
        box = tab.page.locator('.chart[data-title="Reward"]')
        assert box.locator(".legend button").all_inner_texts()[0].split() == ["training", "1"]
        area = box.locator(".u-over").bounding_box()
        tab.page.mouse.move(area["x"] + area["width"] * 19 / 39, area["y"] + 50)
        assert box.locator(".at").inner_text() == "step 20"
        assert box.locator(".legend button").all_inner_texts()[0].split() == ["training", "0.5"]
        other = tab.page.locator('.chart[data-title^="Mismatch"]')
        assert other.locator(".at").inner_text() == "step 20", "the cursors move together"
        assert "1.0e−20" in other.locator(".legend").inner_text().split()
        drawn = box.locator("canvas").evaluate(
            "c => new Set(c.getContext('2d').getImageData(0, 0, c.width, c.height).data).size"
        )
        assert drawn > 20, "there is a curve on the canvas"
        tab.page.get_by_text("more metrics").click()
        tab.fill("Filter metrics by name", "task/")
        tab.page.wait_for_selector(".more .chart", state="attached")
        assert tab.texts(".more .chart:not([hidden]) h3") == ["task/thing"]


def test_data_can_be_downloaded(browser: Any, made: RunDir, made_page: Path) -> None:
    records = recorded(made)
    with Tab(browser, made_page) as tab:
        rows = list(csv.DictReader(io.StringIO(tab.download("metrics.csv"))))
        lines = read_metrics(made.metrics)
        assert len(rows) == len(lines)
        for row, line in zip(rows, lines, strict=True):
            assert {key: float(value) for key, value in row.items() if value} == line
        tab.page.locator('.chart[data-title="Entropy"]').hover()
        with tab.page.expect_download() as waiting:
            tab.page.locator('.chart[data-title="Entropy"]').get_by_role("button", name="CSV").click()
        rows = list(csv.DictReader(io.StringIO(Path(waiting.value.path()).read_text())))
        assert [float(row["entropy"]) for row in rows] == [line["entropy"] for line in lines]

        tab.page.keyboard.press("2")
        tab.fill("Group, problem or text", "train/000040/01")
        kept = [json.loads(line) for line in tab.download("JSONL").splitlines()]
        assert len(kept) == 16
        for each in kept:
            wanted = records[each["rollout_id"]]
            assert {key: value for key, value in each.items() if key != "turns"} == {
                key: value for key, value in wanted.items() if key != "turns"
            }
            for turn, original in zip(each["turns"], wanted["turns"], strict=True):
                offset = original["prompt_offset"]
                assert turn["prompt_token_ids"] == original["prompt_token_ids"][offset:]
                assert turn["completion_ids"] == original["completion_ids"]
                for key in ("logprobs", "trainer_logprobs", "entropies"):
                    ours, theirs = turn[key], original[key]
                    assert (ours is None) == (theirs is None)
                    assert ours is None or np.array_equal(np.array(ours, np.float32), np.array(theirs, np.float32))


def test_it_is_used_by_keyboard(browser: Any, made_page: Path) -> None:
    with Tab(browser, made_page) as tab:
        press, page = tab.page.keyboard.press, tab.page

        def current() -> str:
            return (page.locator(".cell[aria-current]").get_attribute("aria-label") or "").split(":")[0]

        press("Tab")
        assert page.evaluate("document.activeElement.id") == "tab-curves"
        press("ArrowRight")
        assert page.evaluate("document.body.dataset.view") == "rollouts"
        first = current()
        press("j")
        assert current() != first
        press("k")
        assert current() == first
        press("J")
        assert current().rsplit("/", 1)[0] != first.rsplit("/", 1)[0]
        press("K")
        press("g")
        assert page.locator(".card").count() == 16
        press("g")
        press("/")
        page.keyboard.type("train/000040/02")
        press("Escape")
        assert len(tab.shown()) == 16
        tinted = page.locator('[aria-label="Colour tokens by"] [aria-checked=true]')
        before = tinted.inner_text()
        press("c")
        assert tinted.inner_text() != before

        page.locator(".sampled").first.focus()
        press("ArrowRight")
        assert page.evaluate("document.activeElement === document.querySelectorAll('.sampled')[1]")
        assert page.locator("#tip").is_visible(), "the tooltip of a token also opens by keyboard"

        press("1")
        page.locator('.chart[data-title="Reward"] .plot').focus()
        press("Home")
        press("ArrowRight")
        assert page.locator('.chart[data-title="Reward"] .at').inner_text() == "step 2"
        press("t")
        assert page.evaluate("document.documentElement.dataset.theme") == "dark"
        press("?")
        assert page.locator("#help").is_visible()
        press("Escape")
        press("3")
        assert page.evaluate("document.body.dataset.view") == "config"
        reachable = page.evaluate(
            "[...document.querySelectorAll('button, input, select')].every(e => e.tabIndex >= -1)"
        )
        assert reachable


def test_texts_of_models_and_tasks_are_texts(browser: Any, made_page: Path) -> None:
    """HTML in a completion, token, problem, error or warning is shown as text."""
    with Tab(browser, made_page) as tab:
        assert HOSTILE in tab.texts(".note")
        tab.page.keyboard.press("2")
        tab.fill("Group, problem or text", "window.hacked")
        assert tab.shown() == ["train/000040/00/03"]
        assert tab.texts(".detail pre.note") == [HOSTILE]
        assert HOSTILE in "".join(tab.texts(".said .text"))
        assert tab.texts(".sampled") == ["a", HOSTILE, "<b>", HOSTILE, "⏎"]
        hover(tab, ".sampled >> nth=1")
        tab.page.keyboard.press("m")
        tab.page.keyboard.press("g")
        tab.page.keyboard.press("3")
        assert tab.page.evaluate("window.hacked") is None
        assert tab.page.locator("img[src=x]").count() == 0
        # Even if a text became HTML, the content security policy of the page would block it.
        tab.page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.hacked = 1\">')")
        tab.page.wait_for_timeout(200)
        assert tab.page.evaluate("window.hacked") is None
        assert any("Content Security Policy" in text for text in tab.complaints)
        tab.complaints.clear()
        tab.requests.clear()


def test_the_config_and_what_differs_from_the_defaults(browser: Any, made_page: Path) -> None:
    with Tab(browser, made_page, "#config") as tab:
        rows = tab.page.locator(".config thead + tbody tr:visible")
        shown = {row[0]: row[1:] for row in (text.split("\t") for text in rows.all_inner_texts())}
        assert shown == {
            "orchestrator.eval.problems": ["20", "128"],
            "orchestrator.group_size": ["16", "32"],
            "orchestrator.groups_per_step": ["3", "9"],
            "seed": ["7", "0"],
        }
        tab.page.get_by_role("radio", name="all (").click()
        assert rows.count() > 60
        tab.fill("Filter by key or value", "packing")
        assert [text.split("\t") for text in rows.all_inner_texts()] == [["trainer.packing", "tree", "tree"]]


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_screenshots(browser: Any, made_page: Path, tmp_path: Path, width: int, theme: str) -> None:
    """No view is wider than the window or empty, and the theme follows the browser."""
    folder = Path(os.environ.get("REPORT_SCREENSHOTS") or tmp_path)
    for view in ("curves", "rollouts", "config"):
        with Tab(browser, made_page, f"#{view}", width=width, theme=theme) as tab:
            path = folder / f"{view}_{theme}_{width}.png"
            tab.page.screenshot(path=path)
            assert tab.page.evaluate("document.documentElement.scrollWidth") <= width
        with PIL.Image.open(path) as picture:
            pixels = np.asarray(picture.convert("L"))
        assert pixels.shape == (900, width)
        ground = np.bincount(pixels.ravel()).argmax()
        assert ground > 230 if theme == "light" else ground < 40
        ink = np.abs(pixels.astype(int) - int(ground)) > 100
        assert 0.002 < ink.mean() < 0.4


def test_the_theme_can_be_changed_and_is_remembered(browser: Any, made_page: Path) -> None:
    with Tab(browser, made_page) as tab:
        ground = "getComputedStyle(document.body).backgroundColor"
        light = tab.page.evaluate(ground)
        tab.page.get_by_label("Light or dark").click()
        dark = tab.page.evaluate(ground)
        assert dark != light
        tab.page.reload()
        tab.page.locator("html[data-ready]").wait_for(state="attached")
        assert tab.page.evaluate(ground) == dark


# ── several runs ────────────────────────────────────────────────────────────────────────────────────────────


def test_runs_side_by_side(
    browser: Any, made: RunDir, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(
        "orchestrator.groups_per_step=3",
        "orchestrator.group_size=16",
        "orchestrator.eval.problems=20",
        "algorithm=rloo",
    )
    other = record(
        tmp_path_factory.mktemp("other") / "other",
        config,
        [(step, [ordinary_rollout("train", step, 2, index, IMAGES) for index in range(16)]) for step in range(1, 21)],
    )
    assert main(["mode=report", f"runs=[{made.path},{other.path}]"]) == 0
    page = made.path.parent / "side_by_side.html"
    assert capsys.readouterr().out == f"{page}\n"
    with Tab(browser, page) as tab:
        assert [text.split("\n")[0] for text in tab.texts(".runs tbody th")] == ["made run", "other"]
        legend = tab.page.locator('.chart[data-title="Entropy"] .legend button').all_inner_texts()
        assert [text.split("\n")[0] for text in legend] == ["made run", "other"]
        area = tab.page.locator('.chart[data-title="Entropy"] .u-over').bounding_box()
        tab.page.mouse.move(area["x"] + area["width"] * 9 / 39, area["y"] + 50)
        legend = tab.page.locator('.chart[data-title="Entropy"] .legend button').all_inner_texts()
        assert [text.split()[-1] for text in legend] == ["0.1", "0.1"]

        tab.page.keyboard.press("3")
        rows = tab.page.locator(".config thead + tbody tr:visible")
        shown = {row[0]: row[1:3] for row in (text.split("\t") for text in rows.all_inner_texts())}
        assert shown["algorithm.loss"] == ["grpo", "rloo"]
        assert shown["seed"] == ["7", "0"]
        assert "trainer.packing" not in shown

        tab.page.keyboard.press("2")
        assert tab.texts(".versus h3") == ["made run", "other"]
        title = tab.texts(".detail .title h2")
        assert title == ["problem 2"], "one that both of them have"
        columns = tab.page.locator(".versus > .cards")
        counts = columns.evaluate_all("all => all.map(each => each.children.length)")
        assert counts
        assert all(count == 16 for count in counts), "the same step of both, next to each other"
