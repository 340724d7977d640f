"""Show a run's progress: a live view in a terminal, and occasional plain lines elsewhere.

The calls that report progress also draw the view, at most four times a second. A drawing thread would take the core
that trains. Plain lines are printed at most every two seconds, except that each evaluation, phase and warning has its
line. Our own text in them is ASCII; characters of a task or a path that the output cannot encode become `?`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from vlmrl.monitor.glimpse import ROWS, Glimpse
from vlmrl.record.metrics import DEMONSTRATION_LOSS, EVAL_GREEDY, EVAL_SAMPLED, PAIR_ACCURACY, Record
from vlmrl.record.splits import set_rewards
from vlmrl.types import Rollout

PHASES = ("preparing", "doctor", "warm-up", "rl", "dpo", "eval", "serve", "bench", "replay")

REFRESH_EVERY_S = 0.25
"""Seconds between two drawings of the live view."""
LINE_EVERY_S = 2.0
"""Seconds between two plain step lines."""
STATUS_EVERY_S = 10.0
"""Seconds between two plain lines about what the run waits for."""
WIDE_COLUMNS = 112
"""Terminal width from which the view shows a second column of metrics."""
SHOWN_WARNINGS = 3
"""How many warnings the view shows; the newest ones."""
BORDER_LINES = 3
"""Terminal lines that the view cannot use: its frame, and the line of the cursor."""
SPARKLINE_STEPS = 400
"""Steps in the sparkline of the reward."""


class Progress:
    """Draws the progress of one run, between `start` and `stop`."""

    def __init__(
        self,
        *,
        name: str,
        total_steps: int,
        live: bool,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name = name
        self._total = total_steps
        self._console = console or Console(highlight=False)
        self._clock = clock
        self._phase = "preparing"
        self._status = ""
        self._step = 0
        self._latest: Mapping[str, Any] = {}
        self._supervised: tuple[int, int, Mapping[str, Any]] | None = None
        self._rewards: deque[float] = deque(maxlen=SPARKLINE_STEPS)
        self._evaluations: list[tuple[int, Mapping[str, Any]]] = []
        self._times: deque[tuple[float, int]] = deque(maxlen=50)
        self._rollouts: tuple[str, Sequence[Rollout]] = ("", ())  # (description, the newest rollouts)
        colors = self._console.color_system in ("truecolor", "256") and not self._console.no_color
        self._glimpse = Glimpse(squares=colors)
        self._warnings: dict[str, int] = {}  # text → step at which it first appeared
        self._announced: set[str] = {"preparing", "eval"}  # these phases need no line: an evaluation has its own
        self._started = clock()
        self._drawn = -REFRESH_EVERY_S
        self._printed = -LINE_EVERY_S
        utf8 = self._console.encoding.lower().startswith("utf")
        can_draw = self._console.is_terminal and not self._console.is_dumb_terminal and utf8
        self._live: Live | None = None
        if live and can_draw:
            self._live = Live(console=self._console, auto_refresh=False, get_renderable=self._view)

    @property
    def is_live(self) -> bool:
        """Whether there is a live view. Otherwise plain lines are printed."""
        return self._live is not None

    def start(self) -> None:
        """Show the live view, or print the run's name."""
        self._started = self._clock()
        if self._live is not None:
            self._live.start(refresh=True)
        else:
            self._print(f"run {self._name}")

    def stop(self) -> None:
        """End the live view; its last state stays on the screen, and the cursor is visible. May be called twice."""
        if self._live is not None:
            self._live.stop()

    # ── progress ────────────────────────────────────────────────────────────────────────────────────────────

    def resume(self, history: Sequence[Record]) -> None:
        """Show the metrics of the run before it was resumed: the kept lines of metrics.jsonl."""
        for record in history:
            if record.get(EVAL_SAMPLED) is not None or set_rewards(record):
                self._evaluations.append((record["step"], record))
            if record.get("reward/mean") is not None:
                self._rewards.append(record["reward/mean"])
        if history:
            self._step, self._latest = history[-1]["step"], history[-1]

    def table(self, title: str, lines: Mapping[str, str]) -> None:
        """Print `lines` as a table of two columns that stays on the screen."""
        width = max(map(len, lines), default=0)
        self._print(title, "bold")
        for key, value in lines.items():
            self._print(f"  {key:<{width}}  {value}")

    def expect(self, total_steps: int) -> None:
        """Set the number of RL steps of the whole run."""
        self._total = total_steps

    def phase(self, phase: str) -> None:
        """Show the phase; print a line the first time."""
        if phase == self._phase:
            return
        self._phase, self._status = phase, ""
        if self._live is not None or phase not in self._announced:
            self._announced.add(phase)
            self._news(f"phase: {phase}", always=True)

    def status(self, text: str) -> None:
        """Show what the run waits for, until the next phase."""
        self._status = text
        since = self._clock() - self._printed
        if self._live is not None or since >= STATUS_EVERY_S:
            self._news(text, always=False)

    def warmup(self, step: int, total: int, metrics: Mapping[str, Any]) -> None:
        """Show a supervised step of `total`."""
        self._supervised = (step, total, metrics)
        self._news(f"warm-up {step}/{total} | loss {_number(metrics.get('loss'), '.3f')}", always=step == total)

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Show an optimizer step."""
        self._step, self._latest = step, metrics
        self._times.append((self._clock(), step))
        if metrics.get("reward/mean") is not None:
            self._rewards.append(metrics["reward/mean"])
        what = (
            f"reward {_number(metrics.get('reward/mean'), '.3f')}"
            f" | mismatch_kl {_number(metrics.get('mismatch_kl/mean'), '.1e')}"
            f" | {_thousands(metrics.get('throughput/tokens_per_s'))} tokens/s"
        )
        if "dpo/accuracy" in metrics:
            what = (
                f"loss {_number(metrics.get('loss'), '.3f')} | accuracy {_number(metrics['dpo/accuracy'], '.2f')}"
                f" | margin {_number(metrics['dpo/margin'], '.3f')}"
            )
        self._news(
            f"step {step}/{self._total} | {what}"
            f" | {_number(metrics.get('time/step'), '.2f')} s/step ({_time_split(metrics)})"
            f" | ETA {self._eta()}",
            always=step == self._total,
        )

    def evaluation(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Show the evaluation after `step`."""
        self._evaluations.append((step, metrics))
        when = f"after step {step}" if step else "before the first step"
        main = f" | sampled {_number(metrics.get(EVAL_SAMPLED), '.3f')}"
        main += f" | greedy {_number(metrics.get(EVAL_GREEDY), '.3f')}"
        loss = f" | held-out loss {metrics[DEMONSTRATION_LOSS]:.3f}" if DEMONSTRATION_LOSS in metrics else ""
        if PAIR_ACCURACY in metrics:
            loss += f" | held-out pairs {metrics[PAIR_ACCURACY]:.3f}"
        sets = set_rewards(metrics)
        of_sets = "".join(f" | {name} {value:.3f}" for name, value in sets.items())
        is_main = EVAL_SAMPLED in metrics or not (sets or loss)
        self._news(f"evaluation {when}" + (main if is_main else "") + of_sets + loss, always=True)

    def rollouts(self, source: str, rollouts: Sequence[Rollout]) -> None:
        """Show `rollouts` in the live view from its next drawing on; `source` describes them."""
        self._rollouts = source, rollouts

    def warn(self, text: str) -> None:
        """Show a warning, once."""
        if text in self._warnings:
            return
        self._warnings[text] = self._step
        self._news(f"warning: {text}", always=True)

    # ── plain lines ─────────────────────────────────────────────────────────────────────────────────────────

    def _news(self, line: str, *, always: bool) -> None:
        """Draw the view or print the line, unless the last time was too recent and not `always`."""
        now = self._clock()
        if self._live is not None:
            if always or now - self._drawn >= REFRESH_EVERY_S:
                self._drawn = now
                self._live.refresh()
        elif always or now - self._printed >= LINE_EVERY_S:
            self._printed = now
            self._print(line)

    def _print(self, line: str, style: str = "") -> None:
        encoding = self._console.encoding
        shown = line.encode(encoding, "replace").decode(encoding)
        self._console.print(Text(shown, style=style), soft_wrap=True)
        self._console.file.flush()

    # ── live view ───────────────────────────────────────────────────────────────────────────────────────────

    def _view(self) -> RenderableType:
        main = _grid(self._main_metrics())
        body: RenderableType = main
        if self._console.width >= WIDE_COLUMNS:
            columns = Table.grid(expand=True, padding=(0, 3, 0, 0))
            columns.add_column(ratio=3)
            columns.add_column(ratio=2)
            columns.add_row(main, _grid(self._detail_metrics()))
            body = columns
        newest = list(self._warnings.items())[-SHOWN_WARNINGS:]
        warnings = [Text(f"! step {step}: {text}", style="yellow") for text, step in newest]
        taken = len(self._main_metrics()) + sum(1 + len(text) // (self._console.width - 4) for text in warnings)
        rollouts = self._last_rollouts(self._console.height - taken - BORDER_LINES)
        title = Text.assemble(("vlmrl ", "bold cyan"), (self._name, "bold"))
        return Panel(
            Group(body, *rollouts, *warnings),
            title=title,
            title_align="left",
            subtitle=Text(
                " · ".join(filter(None, (self._status, self._phase, duration(self._clock() - self._started))))
            ),
            subtitle_align="right",
            border_style="cyan",
        )

    def _last_rollouts(self, lines: int) -> list[RenderableType]:
        """As many of the newest rollouts as fit in `lines` lines, under a line that describes them."""
        source, rollouts = self._rollouts
        shown = rollouts[: max(0, (lines - 1) // (ROWS + 1))]
        return [Rule(Text(source, style="dim"), style="dim", align="left"), self._glimpse.draw(shown)] if shown else []

    def _main_metrics(self) -> list[tuple[str, RenderableType]]:
        latest = self._latest
        if self._phase == "warm-up" and self._supervised is not None:
            step, total, metrics = self._supervised
            loss = f"loss {_number(metrics.get('loss'), '.3f')}"
            rows: list[tuple[str, RenderableType]] = [("warm-up", _bar(step, total, loss))]
        else:
            rows = [("step", _bar(self._step, self._total, f"ETA {self._eta()}"))]
        reward = self._rewards[-1] if self._rewards else None
        rows.append(("reward", _value(_number(reward, ".3f"), sparkline(self._rewards, 40))))
        rows.append(("held-out", self._held_out()))
        rows += self._set_values()
        mean, worst = latest.get("mismatch_kl/mean"), latest.get("mismatch_kl/max")
        rows.append(("mismatch_kl", _value(f"mean {_number(mean, '.1e')}  max {_number(worst, '.1e')}")))
        speed = f"{_thousands(latest.get('throughput/tokens_per_s'))} tokens/s"
        speed += f"  {_number(latest.get('time/step'), '.2f')} s/step"
        rows.append(("speed", _value(speed, _time_split(latest))))
        return rows

    def _held_out(self) -> Text:
        if not self._evaluations:
            return _value("-")
        step, newest = self._evaluations[-1]
        mains = [scores for _, scores in self._evaluations if scores.get(EVAL_SAMPLED) is not None]
        newest = mains[-1] if mains else newest
        sampled = [scores[EVAL_SAMPLED] for _, scores in self._evaluations if scores.get(EVAL_SAMPLED) is not None]
        both = f"sampled {_number(newest.get(EVAL_SAMPLED), '.3f')}  greedy {_number(newest.get(EVAL_GREEDY), '.3f')}"
        return _value(both, f"{sparkline(sampled, 16)} step {step}")

    def _set_values(self) -> list[tuple[str, RenderableType]]:
        """The newest reward of each named set."""
        newest: dict[str, float] = {}
        for _, metrics in self._evaluations:
            newest |= set_rewards(metrics)
        return [("sets", Text("  ".join(f"{name} {value:.3f}" for name, value in newest.items())))] if newest else []

    def _detail_metrics(self) -> list[tuple[str, RenderableType]]:
        latest = self._latest
        dropped, total = latest.get("rollouts/dropped"), latest.get("rollouts/total")
        memory = latest.get("memory/peak_bytes")
        norm = _number(latest.get("grad_norm"), ".2f")
        return [
            ("loss", _value(_number(latest.get("loss"), ".4f"), f"grad norm {norm}")),
            ("entropy", _value(_number(latest.get("entropy"), ".3f"))),
            ("dropped", _value(f"{_number(dropped, '.0f')} of {_number(total, '.0f')}", "rollouts")),
            ("staleness", _value(_number(latest.get("staleness/mean"), ".1f"), "steps")),
            ("memory", _value("-" if memory is None else f"{memory / 2**30:.2f}", "GiB peak")),
        ]

    def _eta(self) -> str:
        """Time left at the speed of the last steps, including evaluations between them."""
        if len(self._times) < 2:
            return "-"
        (since, first), (until, last) = self._times[0], self._times[-1]
        return duration((until - since) / (last - first) * (self._total - last))


def _grid(metrics: Sequence[tuple[str, RenderableType]]) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0), expand=True)
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    for label, value in metrics:
        grid.add_row(label, value)
    return grid


def _bar(step: int, total: int, beside: str) -> RenderableType:
    grid = Table.grid(padding=(0, 2, 0, 0), expand=True)
    grid.add_column(no_wrap=True)
    grid.add_column(ratio=1)
    grid.add_column(no_wrap=True)
    bar = ProgressBar(total=max(total, 1), completed=step)
    grid.add_row(Text(f"{step} / {total}", style="bold"), bar, Text(beside))
    return grid


def _value(value: str, beside: str = "") -> Text:
    return Text.assemble((value, "bold"), "  ", beside)


def sparkline(values: Sequence[float], width: int) -> str:
    """One bar per value, scaled from the smallest to the largest. If there are more than `width` values, neighbours are
    averaged.

    >>> sparkline([0.0, 1.0, 2.0, 3.0], 8), sparkline([0.0, 0.0, 3.0, 3.0], 2), sparkline([], 8)
    ('▁▃▆█', '▁█', '')
    """
    count, width = len(values), min(width, len(values))
    series = list(values)
    edges = [count * place // width for place in range(width + 1)] if width else [0]
    means = [sum(series[start:end]) / (end - start) for start, end in pairwise(edges)]
    low, high = min(means, default=0.0), max(means, default=0.0)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (mean - low) / (high - low)) if high > low else 0] for mean in means)


def duration(seconds: float) -> str:
    """Format seconds as m:ss or h:mm:ss.

    >>> duration(58.4), duration(3725)
    ('0:58', '1:02:05')
    """
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _thousands(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value / 1000:.1f}k" if value >= 1000 else f"{value:.0f}"


def _time_split(metrics: Mapping[str, Any]) -> str:
    """Shares of the step time.

    >>> _time_split({"time/step": 2.0, "time/rollout": 1.0, "time/train": 0.5, "time/sync": 0.0})
    'rollout 50% train 25% sync 0%'
    """
    whole = metrics.get("time/step")
    if not whole:
        return "-"
    parts = {key: metrics.get(f"time/{key}") for key in ("rollout", "train", "sync")}
    return " ".join(f"{key} {seconds / whole:.0%}" for key, seconds in parts.items() if seconds is not None)
