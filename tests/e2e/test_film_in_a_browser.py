"""The film of an episode in report.html, in a real Chromium: frames, actions, rewards, controls and keys."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.browser import Tab, in_chromium
from support.report_runs import Alphabet, config_of, noise, one_rollout, one_turn, record
from vlmrl.cli.past_runs import default_config
from vlmrl.monitor.report.page import write_report
from vlmrl.record.rollouts import RolloutRecorder
from vlmrl.record.run_dir import RunDir
from vlmrl.types import Image, ImageItem, Message, Rollout, Turn

pytestmark = in_chromium

FRAMES = [noise(seed, 16, 24) for seed in range(4)]
HOSTILE = "<img src=x onerror='window.hacked=1'>"
ACTIONS = ["left", HOSTILE, "", "up"]
REWARDS = [0.25, -0.5, 0.0, 1.5]
FRAME_MS = 700
FILM = "train/000001/00/00"


def turns_of(frames: list[ImageItem | None], *, step: int = 1) -> list[Turn]:
    """Turns that extend each other, with `ACTIONS` and `REWARDS`."""
    turns: list[Turn] = []
    for frame, text, reward in zip(frames, ACTIONS, REWARDS, strict=False):
        before = turns[-1] if turns else None
        ids = [ord(letter) for letter in text] or [ord("#")]
        turns.append(one_turn(text, frame, step=step, reward=reward, advantage=0.5, before=before, ids=ids))
    return turns


def starting_over() -> list[Turn]:
    """The second turn shows the first frame again, and then its own."""
    first, second = turns_of([FRAMES[0], FRAMES[1]])
    fresh = one_turn("down", FRAMES[1], step=1, reward=0.0, advantage=0.5)
    image = [Message.of("user", "was ", Image(FRAMES[0].pixels)), Message.of("assistant", "left"), *fresh.messages]
    place = dataclasses.replace(fresh.prompt.placeholders[0], offset=0, hash=FRAMES[0].hash)
    prompt = dataclasses.replace(
        fresh.prompt, placeholders=(place, *fresh.prompt.placeholders), mm_items=(FRAMES[0], *fresh.prompt.images)
    )
    return [first, dataclasses.replace(second, prompt=prompt, messages=image, branch=1, starts_over=True)]


def rollouts() -> list[Rollout]:
    return [
        one_rollout("train", 1, 0, 0, turns_of([*FRAMES])),
        one_rollout("train", 1, 0, 1, turns_of([FRAMES[0]])),
        one_rollout("train", 1, 0, 2, turns_of([FRAMES[0], None])),
        one_rollout("train", 1, 0, 3, starting_over()),
    ]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = ("orchestrator.groups_per_step=1", "orchestrator.group_size=4")
    run = record(tmp_path_factory.mktemp("film") / "run", config_of(*shape), [(1, rollouts())])
    write_report({run.name: run}, run.report, default_config())
    return run.report


def opened(browser: Any, page: Path, rollout: str = FILM) -> Tab:
    return Tab(browser, page, f"#rollouts?rollout={rollout}&view=one")


def shown(tab: Tab) -> tuple[list[str], str, dict[str, str]]:
    """Hashes of the frame, the action under it, and what stands beside it."""
    hashes = tab.page.locator(".film .screen img").evaluate_all("all => all.map(each => each.dataset.hash)")
    facts = [text.split("\n") for text in tab.texts(".film .fact")]
    return hashes, tab.page.locator(".film .action").inner_text(), dict(facts)


def turn_of(tab: Tab) -> int:
    return int(tab.page.locator(".film input").input_value()) + 1


def test_each_frame_has_its_action_its_reward_and_the_sum(browser: Any, page: Path) -> None:
    sums = ["0.25", "−0.25", "−0.25", "1.25"]
    with opened(browser, page) as tab:
        for number, frame in enumerate(FRAMES):
            hashes, action, facts = shown(tab)
            assert hashes == [frame.hash]
            assert action == (ACTIONS[number] or "(an empty answer)")
            assert facts["turn"] == f"{number + 1} of 4"
            assert facts["turn reward"] == ["0.25", "−0.5", "0", "1.5"][number]
            assert facts["sum so far"] == sums[number]
            assert ("reward of the episode" in facts) == (number == 3)
            marked = tab.page.locator("article.turn").evaluate_all(
                "all => all.map(each => each.classList.contains('now'))"
            )
            assert marked == [index == number for index in range(4)]
            tab.page.get_by_role("button", name="One frame on").click()
        assert shown(tab)[2]["reward of the episode"] == "1.5"
        assert shown(tab)[2]["end"] == "terminated"
        assert turn_of(tab) == 4, "the last frame stays"
        widths = tab.page.locator(".film .screen img").evaluate_all("all => all.map(each => each.clientWidth)")
        assert widths == [240], "24 pixels, enlarged without smoothing"
        assert tab.page.evaluate("window.hacked") is None


def test_it_plays_to_its_end_and_again(browser: Any, page: Path) -> None:
    with opened(browser, page) as tab:
        tab.page.clock.install()
        tab.page.get_by_role("button", name="Play", exact=True).click()
        assert turn_of(tab) == 1
        for turn in (2, 3, 4):
            assert tab.page.get_by_role("button", name="Pause", exact=True).count() == 1
            tab.page.clock.run_for(FRAME_MS)
            assert turn_of(tab) == turn
        tab.page.get_by_role("button", name="Play", exact=True).click()
        assert turn_of(tab) == 1, "it begins again"
        tab.page.clock.run_for(FRAME_MS)
        tab.page.get_by_role("button", name="Pause", exact=True).click()
        tab.page.clock.run_for(10 * FRAME_MS)
        assert turn_of(tab) == 2, "a film that pauses stands still"


def test_keys_slider_and_bars(browser: Any, page: Path) -> None:
    with opened(browser, page) as tab:
        keyboard = tab.page.keyboard
        for key, turn in ((".", 2), (".", 3), (",", 2)):
            keyboard.press(key)
            assert turn_of(tab) == turn, "keys of the whole page"
        tab.page.locator(".film").focus()
        for key, turn in (
            ("ArrowRight", 3),
            ("ArrowLeft", 2),
            ("End", 4),
            ("ArrowRight", 4),
            ("Home", 1),
            ("ArrowLeft", 1),
        ):
            keyboard.press(key)
            assert turn_of(tab) == turn, key
        assert "rollout=train%2F000001%2F00%2F00" in tab.page.url, "the arrows are the film's"
        keyboard.press("Space")
        tab.page.get_by_role("button", name="Pause", exact=True).wait_for()
        keyboard.press("p")
        tab.page.get_by_role("button", name="Play", exact=True).wait_for()
        slider = tab.page.get_by_label("Turn of the film")
        slider.fill("2")
        assert shown(tab)[0] == [FRAMES[2].hash]
        slider.press("ArrowRight")
        assert shown(tab)[0] == [FRAMES[3].hash]
        assert slider.get_attribute("aria-valuetext") == "turn 4 of 4"
        tab.page.locator(".film .bars i").nth(1).click()
        assert turn_of(tab) == 2
        heights = tab.page.locator(".film .bars i").evaluate_all("all => all.map(each => each.clientHeight)")
        signs = tab.page.locator(".film .bars i").evaluate_all(
            "all => all.map(each => each.classList.contains('below'))"
        )
        assert signs == [reward < 0 for reward in REWARDS]
        assert heights[3] > heights[1] > heights[0] > heights[2]


def test_only_episodes_of_several_turns_with_images_are_films(browser: Any, page: Path) -> None:
    with opened(browser, page) as tab:
        for index, films in ((0, 1), (1, 0), (2, 0), (3, 1)):
            tab.open(f"train/000001/00/{index:02d}")
            assert tab.page.locator(".film").count() == films, index
        tab.page.keyboard.press(".")
        assert shown(tab)[0] == [FRAMES[1].hash], "of a turn that starts over, only the new frame"


COUNT_TIMERS = """() => {
  window.running = new Set();
  const [start, end] = [window.setInterval, window.clearInterval];
  window.setInterval = (...given) => { const id = start(...given); running.add(id); return id; };
  window.clearInterval = (id) => { running.delete(id); end(id); };
}"""


def test_a_film_stops_when_another_rollout_is_opened(browser: Any, page: Path) -> None:
    with opened(browser, page) as tab:
        tab.page.evaluate(COUNT_TIMERS)
        tab.page.keyboard.press("p")
        assert tab.page.evaluate("running.size") == 1
        tab.open("train/000001/00/03")
        assert tab.page.evaluate("running.size") == 0
        tab.open("train/000001/00/01")
        tab.page.keyboard.press("p")  # there is no film, and no complaint
        assert tab.page.evaluate("running.size") == 0


def test_a_run_of_mode_play_opens_with_its_film(browser: Any, tmp_path: Path) -> None:
    """It has no curves; its tokens have no logprobs and no policy version."""
    run = RunDir(tmp_path / "played")
    run.create()
    config = config_of("mode=play")
    config.output_dir = str(run.path)
    run.write_config(config)
    turns = turns_of([*FRAMES])
    for turn in turns:
        nothing = np.full(len(turn.completion.token_ids), np.nan, np.float32)
        turn.completion = dataclasses.replace(turn.completion, logprobs=nothing, versions=np.full(len(nothing), -1))
        turn.learned, turn.advantage = None, 0.0
    recorder = RolloutRecorder(run)
    recorder.spell_with(Alphabet({}))
    recorder.write(1, {"train": [one_rollout("train", 1, 0, 0, turns)]})
    recorder.close()
    write_report({run.name: run}, run.report, default_config())
    with Tab(browser, run.report) as tab:
        assert tab.page.locator("body").get_attribute("data-view") == "rollouts"
        assert shown(tab)[0] == [FRAMES[0].hash]
        scored = tab.texts(".scored")
        assert all("advantage" not in text and "no loss" in text for text in scored), scored
        facts = dict(text.split("\n") for text in tab.texts(".detail > .facts .fact"))
        assert facts["policy version"] == "–"
        assert tab.texts(".sample") == ["All 1 recorded rollouts."]
