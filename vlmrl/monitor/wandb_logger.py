"""Log to Weights & Biases: the metrics of metrics.jsonl, a table of rollouts with their images at each evaluation, and
on request the checkpoints as artifacts.

wandb is an extra (`pip install 'vlmrl[wandb]'`). It runs in one background thread, because importing it and starting
its service takes more than a second. Offline it uses no network; `wandb sync <run directory>/wandb/offline-run-*`
uploads the run later. A resumed run keeps its run id and writes another offline folder (`wandb sync --append`). The
files that a table or an artifact refers to stay in wandb/data until they are synced, so do not move a run directory
before it is synced.

An error in wandb is reported once and ends the logging, not the run. The service process ends with the run: `finish`
stops it, and it exits by itself when the run's process is gone.

Left out on purpose: system metrics, console capture, upload of code and git state (the run directory has them).
"""

from __future__ import annotations

import importlib.util
import os
import secrets
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import psutil
from numpy.typing import NDArray

from vlmrl.config.monitor import WandbConfig, WandbMode
from vlmrl.config.parse import literal
from vlmrl.config.secrets import redacted
from vlmrl.errors import VlmrlError
from vlmrl.record.files import write_bytes_atomically
from vlmrl.record.run_dir import RunDir
from vlmrl.types import ImageItem, Rollout

MAX_HEIGHT = 256
"""Pixels; taller images are scaled down for the strip."""
FLUSH_EVERY_S = 1.0
"""A killed run loses at most this many seconds of wandb's own file (metrics.jsonl loses nothing)."""
FINISH_S = 120.0
"""Seconds in which the rest must reach the disk or the network at the end; then the service is killed."""
GAP = 4
"""Pixels between the images of a strip."""
COLUMNS = ("kind", "rollout", "problem", "images", "said", "reward", "stop_reason", "dropped")
"""Columns of the table of rollouts; `images` shows all images of the last prompt side by side."""


def settle_wandb(config: WandbConfig) -> WandbConfig:
    """Replace `mode=auto`: by `offline` where wandb is installed, else by `disabled`. Other modes stay."""
    if config.mode is not WandbMode.auto:
        return config
    installed = importlib.util.find_spec("wandb") is not None
    return replace(config, mode=WandbMode.offline if installed else WandbMode.disabled)


class WandbLogger:
    """Logs from one background thread. `on_failure` is called once, in the caller's thread, with the error."""

    def __init__(self, config: WandbConfig, run_dir: RunDir, on_failure: Callable[[str], None]) -> None:
        self._config = settle_wandb(config)
        self._run_dir = run_dir
        self._on_failure = on_failure
        self._thread: ThreadPoolExecutor | None = None
        self._waiting: deque[Future[None]] = deque()
        self._run: Any = None
        self._failed = False

    def start(self) -> None:
        """Start wandb in the background. Does nothing when called again, or when wandb is disabled."""
        if self._config.mode is WandbMode.disabled or self._thread is not None:
            return
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="wandb")
        self._submit(self._init)

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Log the metrics of a step or an evaluation, including its `step`."""
        self._submit(self._log, dict(metrics))

    def log_rollouts(self, step: int, rollouts: Mapping[str, Sequence[Rollout]]) -> None:
        """Log a table (`COLUMNS`) of the first `monitor.wandb.rollouts` rollouts of each kind."""
        named = [(kind, rollout) for kind, group in rollouts.items() for rollout in group[: self._config.rollouts]]
        self._submit(self._log_rollouts, step, named)

    def log_checkpoint(self, step: int, folder: Path) -> None:
        """Log a checkpoint as an artifact. Returns when its files are copied, so that the run may delete them."""
        self._submit(self._log_checkpoint, step, folder)
        wait(self._waiting, FINISH_S)

    def finish(self, exit_code: int) -> None:
        """Write everything that is left and stop wandb's service."""
        if self._thread is None:
            return
        self._submit(self._finish, exit_code)
        if wait(self._waiting, FINISH_S).not_done:
            self._failed = True
            self._on_failure(
                f"Weights & Biases did not finish within {FINISH_S:g} s, so its last metrics may be missing there: "
                "metrics.jsonl has them all"
            )
            for child in psutil.Process().children():
                if child.name() == "wandb-core":
                    child.kill()  # the background thread then gets an error instead of waiting on
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
                self._on_failure(f"Weights & Biases stopped logging, and the run goes on without it: {reason}")

    # ── called in the background thread ─────────────────────────────────────────────────────────────────────

    def _init(self) -> None:
        offline = self._config.mode is WandbMode.offline
        # wandb reads these variables once, when it is imported or its service starts. `Settings(silent=True)` below
        # covers only the run itself; other messages of wandb (hints, offers) would disturb the live view.
        os.environ.setdefault("WANDB_SILENT", "true")
        if offline:
            # Error reports would use the network.
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        # The folder of files to upload. By default it is in the user's home, away from the run directory.
        os.environ["WANDB_DATA_DIR"] = str(self._run_dir.wandb / "data")
        import wandb

        if not offline and not wandb.login(prompt=False, verify=False):
            # wandb.init would prompt for the key in the terminal, hidden by the live view.
            raise VlmrlError(
                "monitor.wandb.mode=online has no API key, so nothing can be sent: "
                "run `wandb login`, set WANDB_API_KEY, or set monitor.wandb.mode=offline"
            )
        config: Any = None
        if self._run_dir.config.exists():
            config = redacted(literal(self._run_dir.read_config()))
        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            disable_code=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_disable_machine_info=True,
            x_transaction_log_flush_interval=FLUSH_EVERY_S,
        )
        self._run = wandb.init(
            project=self._config.project,
            name=self._config.name or self._run_dir.name,
            group=self._config.group,
            id=self._run_id(),
            resume=None if offline else "allow",
            mode="offline" if offline else "online",
            dir=str(self._run_dir.path),
            config=config,
            settings=settings,
        )
        # Use our step as the x axis, not wandb's count of calls: an evaluation has the same step as the training step
        # before it, and a resumed run repeats some steps.
        self._run.define_metric("*", step_metric="step")
        self._run.define_metric("warmup/*", step_metric="warmup/step")

    def _run_id(self) -> str:
        path = self._run_dir.wandb_run_id
        if path.exists():
            return path.read_text(encoding="utf-8").strip()
        run_id = secrets.token_hex(4)
        path.parent.mkdir(exist_ok=True)
        write_bytes_atomically(path, run_id.encode())
        return run_id

    def _log(self, metrics: dict[str, Any]) -> None:
        self._run.log({key: value for key, value in metrics.items() if value is not None})

    def _log_rollouts(self, step: int, named: list[tuple[str, Rollout]]) -> None:
        import wandb

        table = wandb.Table(columns=list(COLUMNS))
        for kind, rollout in named:
            images = rollout.turns[-1].prompt.images if rollout.turns else ()
            table.add_data(
                kind,
                rollout.rollout_id,
                rollout.problem_id,
                wandb.Image(strip(images)) if images else None,
                said(rollout),
                rollout.reward,
                str(rollout.stop_reason),
                rollout.dropped and str(rollout.dropped),
            )
        if named:
            self._run.log({"eval/rollouts": table, "step": step})

    def _log_checkpoint(self, step: int, folder: Path) -> None:
        import wandb

        artifact = wandb.Artifact(f"checkpoint-{self._run.id}", type="model", metadata={"step": step})
        artifact.add_dir(str(folder))
        self._run.log_artifact(artifact, aliases=["latest", folder.name])

    def _finish(self, exit_code: int) -> None:
        import wandb

        self._run.finish(exit_code=exit_code)
        wandb.teardown(exit_code=exit_code)  # otherwise the service runs until the interpreter exits


def strip(images: Sequence[ImageItem]) -> NDArray[np.uint8]:
    """At least one image, side by side on white: uint8 [H, W, 3], H at most `MAX_HEIGHT`."""
    pictures = [PIL.Image.fromarray(image.pixels) for image in images]
    for picture in pictures:
        picture.thumbnail((picture.width, MAX_HEIGHT))
    width = sum(picture.width for picture in pictures) + GAP * (len(pictures) - 1)
    canvas = PIL.Image.new("RGB", (width, max(picture.height for picture in pictures)), "white")
    left = 0
    for picture in pictures:
        canvas.paste(picture, (left, 0))
        left += picture.width + GAP
    return np.asarray(canvas)


def said(rollout: Rollout) -> str:
    """The texts of the completions, turn by turn."""
    return " / ".join(turn.text for turn in rollout.turns)
