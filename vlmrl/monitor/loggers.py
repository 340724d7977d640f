"""The interface of the loggers that show a run elsewhere: Weights & Biases, TensorBoard.

    Monitor ─▶ Loggers ─┬─▶ WandbLogger        one background thread each, because importing a logger's package takes a
                        └─▶ TensorboardLogger  second and writing may wait for a disk or a network

An error in a logger is reported once and ends that logger, not the run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from vlmrl.rendering.filmstrip import filmstrip
from vlmrl.types import ImageItem, MMItem, Rollout

MAX_HEIGHT = 256
"""Pixels; taller images are scaled down for the strip."""
GAP = 4
"""Pixels between the images of a strip."""
FINISH_S = 120.0
"""Seconds in which the rest must reach the disk or the network at the end."""


class BackgroundLogger(ABC):
    """Logs from one background thread. The methods without underscore are called in the caller's thread; those that a
    subclass implements run in the background thread, one after the other."""

    name: ClassVar[str]
    """What messages call it."""

    def __init__(self, on_failure: Callable[[str], None], *, rollouts: int, is_enabled: bool) -> None:
        """`on_failure` is called once, in the caller's thread, with the error. `rollouts`: how many of each kind an
        evaluation logs. A logger that is not enabled does nothing."""
        self._on_failure = on_failure
        self._rollouts = rollouts
        self._is_enabled = is_enabled
        self._thread: ThreadPoolExecutor | None = None
        self._waiting: deque[Future[None]] = deque()
        self._failed = False

    def start(self) -> None:
        """Start in the background. Does nothing when called again, or when the logger is not enabled."""
        if self._is_enabled and self._thread is None:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=self.name)
            self._submit(self._init)

    def resume_at(self, step: int, *, supervised_steps: int) -> None:  # noqa: B027 — few loggers need it
        """The run repeats the steps after `step`, and the supervised steps after so many. Called before `start`."""

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Log the metrics of a step or an evaluation, including its `step`, or of a supervised step (`warmup/…`)."""
        self._submit(self._log, {key: value for key, value in metrics.items() if value is not None})

    def log_rollouts(self, step: int, rollouts: Mapping[str, Sequence[Rollout]]) -> None:
        """Log the first rollouts of each kind, with their images."""
        named = [(kind, rollout) for kind, group in rollouts.items() for rollout in group[: self._rollouts]]
        self._submit(self._log_rollouts, step, named)

    def log_checkpoint(self, step: int, folder: Path) -> None:
        """Log a checkpoint, where the logger is asked to. Returns when its files are copied, so that the run may delete
        them."""
        self._submit(self._log_checkpoint, step, folder)
        wait(self._waiting, FINISH_S)

    def finish(self, exit_code: int) -> None:
        """Write everything that is left, and stop."""
        if self._thread is None:
            return
        self._submit(self._finish, exit_code)
        if wait(self._waiting, FINISH_S).not_done:
            self._failed = True
            self._on_failure(
                f"{self.name} did not finish within {FINISH_S:g} s, so its last metrics may be missing there: "
                "metrics.jsonl has them all"
            )
            self._give_up()
        self._collect(wait=True)
        self._thread.shutdown()
        self._thread = None

    def _submit(self, call: Callable[..., None], *arguments: Any) -> None:
        self._collect(wait=False)
        if self._thread is not None and not self._failed:
            self._waiting.append(self._thread.submit(call, *arguments))

    def _collect(self, *, wait: bool) -> None:
        while self._waiting and (wait or self._waiting[0].done()):
            error = self._waiting.popleft().exception()
            if error is not None and not self._failed:
                self._failed = True
                reason = str(error).strip() or type(error).__name__
                self._on_failure(f"{self.name} stopped logging, and the run goes on without it: {reason}")

    def _give_up(self) -> None:  # noqa: B027 — few loggers need it
        """Make the background thread return. Called in the caller's thread."""

    @abstractmethod
    def _init(self) -> None:
        """Import the package and open the log."""

    @abstractmethod
    def _log(self, metrics: dict[str, Any]) -> None:
        """`log` in the background thread."""

    @abstractmethod
    def _log_rollouts(self, step: int, named: list[tuple[str, Rollout]]) -> None:
        """`log_rollouts` in the background thread: pairs of a kind and a rollout."""

    @abstractmethod
    def _log_checkpoint(self, step: int, folder: Path) -> None:
        """`log_checkpoint` in the background thread."""

    @abstractmethod
    def _finish(self, exit_code: int) -> None:
        """Write what is left. `exit_code` 1: the run ended with an error."""


class Loggers:
    """Several loggers; each gets everything."""

    def __init__(self, *loggers: BackgroundLogger) -> None:
        self._loggers = loggers

    def start(self) -> None:
        for logger in self._loggers:
            logger.start()

    def resume_at(self, step: int, *, supervised_steps: int) -> None:
        for logger in self._loggers:
            logger.resume_at(step, supervised_steps=supervised_steps)

    def log(self, metrics: Mapping[str, Any]) -> None:
        for logger in self._loggers:
            logger.log(metrics)

    def log_rollouts(self, step: int, rollouts: Mapping[str, Sequence[Rollout]]) -> None:
        for logger in self._loggers:
            logger.log_rollouts(step, rollouts)

    def log_checkpoint(self, step: int, folder: Path) -> None:
        for logger in self._loggers:
            logger.log_checkpoint(step, folder)

    def finish(self, exit_code: int) -> None:
        for logger in self._loggers:
            logger.finish(exit_code)


# ── how a rollout is shown ──────────────────────────────────────────────────────────────────────────────────


def strip(items: Sequence[MMItem]) -> NDArray[np.uint8]:
    """At least one image or video, side by side on white: uint8 [H, W, 3], H at most `MAX_HEIGHT`. A video is shown as
    a filmstrip."""
    pictures = [PIL.Image.fromarray(item.pixels if isinstance(item, ImageItem) else filmstrip(item)) for item in items]
    for picture in pictures:
        picture.thumbnail((picture.width, MAX_HEIGHT))
    width = sum(picture.width for picture in pictures) + GAP * (len(pictures) - 1)
    canvas = PIL.Image.new("RGB", (width, max(picture.height for picture in pictures)), "white")
    left = 0
    for picture in pictures:
        canvas.paste(picture, (left, 0))
        left += picture.width + GAP
    return np.asarray(canvas)


def last_items(rollout: Rollout) -> Sequence[MMItem]:
    """All images and videos of the last prompt of a rollout."""
    return rollout.turns[-1].prompt.mm_items if rollout.turns else ()


def said(rollout: Rollout) -> str:
    """The texts of the completions, turn by turn."""
    return " / ".join(turn.text for turn in rollout.turns)
