from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pexpect
import pytest
from rich.console import Console

import vlmrl
from support.rollout_builders import image, rollout
from vlmrl.monitor.progress import LINE_EVERY_S, REFRESH_EVERY_S, Progress

METRICS = {
    "reward/mean": 0.4123,
    "mismatch_kl/mean": 2.1e-13,
    "mismatch_kl/max": 3.4e-10,
    "throughput/tokens_per_s": 23_111.0,
    "time/step": 0.48,
    "time/rollout": 0.3,
    "time/train": 0.15,
    "time/sync": 0.0,
    "loss": 0.1234,
    "grad_norm": 1.5,
    "entropy": 0.321,
    "staleness/mean": 0.0,
    "rollouts/total": 256,
    "rollouts/dropped": 3,
    "memory/peak_bytes": 2**29,
}


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Screen:
    """A terminal that knows text, line feeds, cursor up and erase line; it rejects any other output."""

    def __init__(self, output: str) -> None:
        self.rows = [""]
        self.row = 0
        self.column = 0
        self.cursor_visible = True
        for control, parameter, final, text in re.findall(r"(\x1b\[([?0-9;]*)([A-Za-z]))|([^\x1b])", output):
            if control:
                self.control(parameter, final)
            else:
                self.put(text)
        assert "\x1b" not in re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", output), "a stray escape character"

    def control(self, parameter: str, final: str) -> None:
        if final == "A":
            self.row -= int(parameter)
            assert self.row >= 0, "the cursor left the screen"
        elif (parameter, final) == ("2", "K"):
            self.rows[self.row] = ""
        elif parameter == "?25":
            self.cursor_visible = final == "h"
        else:
            assert final == "m", f"unexpected control sequence {parameter}{final}"

    def put(self, text: str) -> None:
        if text == "\r":
            self.column = 0
        elif text == "\n":
            self.row, self.column = self.row + 1, 0
            self.rows += [""] * (self.row + 1 - len(self.rows))
        else:
            row = self.rows[self.row].ljust(self.column)
            self.rows[self.row] = row[: self.column] + text + row[self.column + 1 :]
            self.column += 1


def plain(live: bool = True, encoding: str = "utf-8") -> tuple[Progress, Clock, Callable[[], list[str]]]:
    """A view whose output is not a terminal, its clock, and the lines printed so far."""
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, encoding=encoding), width=80, highlight=False)
    clock = Clock()
    progress = Progress(name="my_run", total_steps=400, live=live, console=console, clock=clock)
    return progress, clock, lambda: raw.getvalue().decode(encoding).splitlines()


def terminal(width: int, live: bool = True) -> tuple[Progress, Clock, io.StringIO]:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=width, height=40, highlight=False, _environ={})
    clock = Clock()
    return Progress(name="my_run", total_steps=400, live=live, console=console, clock=clock), clock, output


# ── live view ───────────────────────────────────────────────────────────────────────────────────────────────


def shown(width: int) -> list[str]:
    """The last view of a run of 120 steps."""
    progress, clock, output = terminal(width)
    progress.start()
    progress.evaluation(0, {"eval/reward": 0.0, "eval/reward_greedy": 0.0})
    progress.phase("rl")
    for step in range(1, 121):
        clock.now += 0.5
        progress.step(step, METRICS)
    progress.evaluation(120, {"eval/reward": 0.875, "eval/reward_greedy": 0.9375})
    progress.warn("Something looks wrong.")
    progress.stop()
    return Screen(output.getvalue()).rows


@pytest.mark.parametrize("width", [80, 140])
def test_the_view_fills_its_width_and_says_what_matters(width: int) -> None:
    rows = shown(width)
    assert rows[0].startswith("╭─ vlmrl my_run ─")
    panel = rows[: [row.startswith("╰") for row in rows].index(True) + 1]
    assert {len(row) for row in panel} == {width}
    assert "".join(rows[len(panel) :]) == "", "the panel is drawn once"
    text = "\n".join(panel)
    assert "120 / 400" in text
    assert "ETA 2:20" in text  # 280 steps at 0.5 s
    assert "0.412" in text
    assert "sampled 0.875  greedy 0.938  ▁█ step 120" in text
    assert "mean 2.1e-13  max 3.4e-10" in text
    assert "23.1k tokens/s  0.48 s/step  rollout 62% train 31% sync 0%" in text
    assert "! step 120: Something looks wrong." in text
    assert panel[-1].endswith(" rl · 1:00 ─╯")
    assert "…" not in text, "nothing is cut"


def test_a_wide_terminal_shows_more() -> None:
    assert "grad norm 1.50" not in "\n".join(shown(80))
    wide = "\n".join(shown(140))
    assert "grad norm 1.50" in wide
    assert "3 of 256  rollouts" in wide
    assert "0.50  GiB peak" in wide


def test_the_warm_up_has_its_own_bar() -> None:
    progress, clock, output = terminal(80)
    progress.start()
    progress.phase("warm-up")
    clock.now += REFRESH_EVERY_S
    progress.warmup(30, 60, {"loss": 1.25})
    progress.stop()
    text = "\n".join(Screen(output.getvalue()).rows)
    assert "30 / 60" in text
    assert "loss 1.250" in text


def test_the_view_is_drawn_at_most_four_times_a_second() -> None:
    progress, clock, output = terminal(80)
    progress.start()
    drawn = []
    for step in range(1, 101):
        clock.now += 0.01
        before = output.tell()
        progress.step(step, METRICS)
        drawn.append(output.tell() > before)
    progress.stop()
    assert 1 <= sum(drawn) <= 1 + 1.0 / REFRESH_EVERY_S


def test_what_others_print_stands_above_the_view() -> None:
    progress, _, output = terminal(80)
    progress.start()
    print("a library says hello")  # while the view is live, rich redirects stdout
    progress.table("plan", {"rollouts per step": "256", "groups": "8"})
    progress.stop()
    rows = Screen(output.getvalue()).rows
    assert rows[:4] == ["a library says hello", "plan", "  rollouts per step  256", "  groups             8"]
    assert rows[4].startswith("╭")


def test_markup_in_names_is_text() -> None:
    progress, _, output = terminal(80)
    progress.start()
    progress.warn("[red]not markup[/red] [/oops]")
    progress.stop()
    assert "[red]not markup[/red] [/oops]" in "\n".join(Screen(output.getvalue()).rows)


# ── the last rollouts ───────────────────────────────────────────────────────────────────────────────────────


def view_of_rollouts(
    width: int = 100, height: int = 40, colors: Literal["truecolor", "256", "standard"] = "truecolor"
) -> tuple[str, list[str]]:
    """A view with three rollouts of two turns: its escape codes, and its rows."""
    output = io.StringIO()
    console = Console(
        file=output, force_terminal=True, width=width, height=height, color_system=colors, highlight=False, _environ={}
    )
    progress = Progress(name="my_run", total_steps=400, live=True, console=console, clock=Clock())
    progress.start()
    shown = [rollout(index) for index in range(3)]
    if colors == "256":  # rich caches a colour as the first console drew it
        shown[0].turns[-1].prompt = replace(shown[0].turns[-1].prompt, mm_items=(image(77),))
    progress.rollouts("rollouts of step 7", shown)
    progress.step(7, METRICS)
    progress.stop()
    return output.getvalue(), [row for row in Screen(output.getvalue()).rows if row]


def test_the_view_shows_what_the_policy_saw_and_said() -> None:
    output, rows = view_of_rollouts()
    assert {len(row) for row in rows} == {100}
    assert sum("reward 0.75  red-green  terminated" in row for row in rows) == 3
    assert sum("› AB" in row for row in rows) == 6
    assert any("rollouts of step 7 ──" in row for row in rows)
    for shade in (10, 20, 30):  # the images in the prompt of the rollout's last turn
        assert f"\x1b[38;2;{shade};{shade};{shade};48;2;{shade};{shade};{shade}m▀" in output


def test_in_256_colours_the_squares_are_still_coloured() -> None:
    output, _ = view_of_rollouts(colors="256")
    assert re.search(r"\x1b\[38;5;\d+;48;5;\d+m▀", output)


def test_with_fewer_colours_there_are_words() -> None:
    output, rows = view_of_rollouts(colors="standard")
    assert "▀" not in output
    assert sum("[image 8 × 8]" in row for row in rows) == 9


@pytest.mark.parametrize(("height", "fit"), [(40, 3), (20, 2), (14, 1), (10, 0)])
def test_rollouts_give_way_where_the_terminal_is_low(height: int, fit: int) -> None:
    _, rows = view_of_rollouts(height=height)
    assert len(rows) < height
    assert sum("reward 0.75" in row for row in rows) == fit
    assert rows[-1].startswith("╰"), "nothing is cut"


# ── plain lines ─────────────────────────────────────────────────────────────────────────────────────────────


def test_steps_on_pairs_show_what_pairs_have() -> None:
    progress, clock, lines = plain()
    clock.now += LINE_EVERY_S
    progress.step(1, {"loss": 0.5, "dpo/accuracy": 0.75, "dpo/margin": 0.25, "time/step": 2.0, "time/train": 1.0})
    progress.evaluation(1, {"eval/dpo/accuracy": 0.875})
    assert lines() == [
        "step 1/400 | loss 0.500 | accuracy 0.75 | margin 0.250 | 2.00 s/step (train 50%) | ETA -",
        "evaluation after step 1 | held-out pairs 0.875",
    ]


def test_no_terminal_gets_plain_lines() -> None:
    progress, clock, lines = plain()
    assert not progress.is_live
    progress.start()
    progress.phase("rl")
    progress.step(1, METRICS)
    clock.now += LINE_EVERY_S
    progress.step(2, METRICS)
    progress.evaluation(2, {"eval/reward": 0.5, "eval/reward_greedy": 0.75})
    progress.warn("Something looks wrong.")
    progress.stop()
    assert lines() == [
        "run my_run",
        "phase: rl",
        "step 2/400 | reward 0.412 | mismatch_kl 2.1e-13 | 23.1k tokens/s | 0.48 s/step "
        "(rollout 62% train 31% sync 0%) | ETA 13:16",
        "evaluation after step 2 | sampled 0.500 | greedy 0.750",
        "warning: Something looks wrong.",
    ]


def test_plain_lines_are_sparse() -> None:
    progress, clock, lines = plain()
    for step in range(1, 401):
        clock.now += 0.25
        progress.step(step, METRICS)
    steps = [line for line in lines() if line.startswith("step ")]
    assert len(steps) == 400 * 0.25 / LINE_EVERY_S + 1
    assert steps[-1].startswith("step 400/400 "), "the last step is always there"


def test_live_can_be_turned_off_in_a_terminal() -> None:
    progress, _, output = terminal(80, live=False)
    progress.start()
    progress.stop()
    assert output.getvalue() == "run my_run\n"


def test_a_dumb_terminal_gets_plain_lines() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "dumb"})
    assert not Progress(name="my_run", total_steps=1, live=True, console=console).is_live


def test_an_output_that_knows_only_ascii() -> None:
    progress, _, lines = plain(encoding="ascii")
    progress.table("plan", {"rollouts": "8 × 32 = 256"})
    assert lines() == ["plan", "  rollouts  8 ? 32 = 256"]


def test_figures_that_are_missing_or_null_are_dashes() -> None:
    progress, _, lines = plain()
    progress.step(1, {"reward/mean": None, "time/step": 0.0})
    assert lines() == ["step 1/400 | reward - | mismatch_kl - | - tokens/s | 0.00 s/step (-) | ETA -"]


def test_a_warning_is_said_once() -> None:
    progress, _, lines = plain()
    for _ in range(3):
        progress.warn("Something looks wrong.")
    assert lines() == ["warning: Something looks wrong."]


def test_a_resumed_view_knows_the_past() -> None:
    progress, _, output = terminal(80)
    progress.resume([{"step": 0, "eval/reward": 0.125}, {"step": 1, "reward/mean": 0.1}, {"step": 2, **METRICS}])
    progress.start()
    progress.stop()
    text = "\n".join(Screen(output.getvalue()).rows)
    assert "2 / 400" in text
    assert "▁█" in text
    assert "sampled 0.125" in text


# ── a real terminal ─────────────────────────────────────────────────────────────────────────────────────────

SCRIPT = """
import sys
from vlmrl.monitor.progress import Progress
progress = Progress(name="my_run", total_steps=400, live=True)
assert progress.is_live
progress.start()
try:
    progress.phase("rl")
    for step in range(1, 200):
        progress.step(step, {"reward/mean": step / 400, "time/step": 0.1})
        if step == 100:
            print("noise on stderr", file=sys.stderr)
    raise RuntimeError("boom")
finally:
    progress.stop()
"""


def test_a_real_terminal_is_given_back_after_an_exception(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    child = pexpect.spawn(
        sys.executable,
        [str(script)],
        dimensions=(40, 80),
        encoding="utf-8",
        timeout=200,
        env={"TERM": "xterm-256color", "PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(vlmrl.__file__).parents[1])},
    )
    output = child.read()
    child.close()
    assert child.exitstatus == 1
    assert "\x1b[?25l" in output, "the cursor is hidden while the view is live"
    screen = Screen(output)
    assert screen.cursor_visible
    assert screen.rows[0] == "noise on stderr"
    assert screen.rows[1].startswith("╭─ vlmrl my_run ─")
    assert "199 / 400" in screen.rows[2]
    assert [row for row in screen.rows if row.startswith("╭")] == [screen.rows[1]], "one view, drawn over itself"
    assert screen.rows[-2] == "RuntimeError: boom"
