"""Weights & Biases: the figures of metrics.jsonl and, at evaluations, a table of some rollouts with their images; on
request the checkpoints as artifacts.

All of wandb happens in one background thread: importing it and starting its service takes over a second. Offline it
touches no network; `wandb sync <run folder>/wandb/offline-run-*` uploads the run later. A resumed run keeps its run id
and writes a further offline folder under it (`wandb sync --append`). What a table or an artifact refers to is kept in
wandb/data until it is synced, so a run folder that is synced later must lie where it was written.

Whatever goes wrong in wandb is said once and ends the logging, never the run. The service process ends with the run:
`finish` stops it, and it watches the run's process id for the case that the run is killed.

Left out on purpose: system metrics, console capture, code and git upload (the run folder has what matters).
"""

from __future__ import annotations

import os
import secrets
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import psutil
from numpy.typing import NDArray
from omegaconf import OmegaConf

from vlmrl.config.monitor import WandbConfig, WandbMode
from vlmrl.config.secrets import redacted
from vlmrl.errors import VlmrlError
from vlmrl.record.files import write_bytes_atomically
from vlmrl.record.run_dir import RunDir
from vlmrl.types import ImageItem, Rollout

MAX_HEIGHT = 256
"""Pixels; larger images are scaled down for the strip."""
FLUSH_EVERY = 1.0
"""Seconds; what a killed run may lose of wandb's own file (metrics.jsonl loses nothing)."""
FINISH_S = 120.0
"""Seconds for what is left to reach the disk or the network at the end; a service that hangs is killed then."""
GAP = 4
"""Pixels between the images of a strip."""
COLUMNS = ("kind", "rollout", "problem", "images", "said", "reward", "stop_reason", "dropped")
"""Of the table of rollouts; `images` are all that the policy saw, side by side."""


class WandbLogger:
    """Logs from one background thread. `on_failure` is called once, on the caller's thread, with what went wrong."""

    def __init__(self, config: WandbConfig, run_dir: RunDir, on_failure: Callable[[str], None]) -> None:
        self._config = config
        self._run_dir = run_dir
        self._on_failure = on_failure
        self._thread: ThreadPoolExecutor | None = None
        self._waiting: deque[Future[None]] = deque()
        self._run: Any = None
        self._failed = False

    def start(self) -> None:
        """Begin to start wandb; returns at once. Does nothing when called again, or when wandb is disabled."""
        if self._config.mode is WandbMode.disabled or self._thread is not None:
            return
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="wandb")
        self._submit(self._init)

    def log(self, metrics: Mapping[str, Any]) -> None:
        """One step's or evaluation's figures, its `step` among them."""
        self._submit(self._log, dict(metrics))

    def log_rollouts(self, step: int, rollouts: Mapping[str, Sequence[Rollout]]) -> None:
        """A table of the first `monitor.wandb.rollouts` rollouts of each kind (`COLUMNS`)."""
        named = [(kind, rollout) for kind, group in rollouts.items() for rollout in group[: self._config.rollouts]]
        self._submit(self._log_rollouts, step, named)

    def log_checkpoint(self, step: int, folder: Path) -> None:
        """The checkpoint as an artifact. Returns when its files are copied: the run may delete them then."""
        self._submit(self._log_checkpoint, step, folder)
        wait(self._waiting, FINISH_S)

    def finish(self, exit_code: int) -> None:
        """Write what is left and stop wandb's service."""
        if self._thread is None:
            return
        self._submit(self._finish, exit_code)
        if wait(self._waiting, FINISH_S).not_done:
            self._failed = True
            self._on_failure(f"Weights & Biases did not finish within {FINISH_S:g} s: its last figures may be lost")
            for child in psutil.Process().children():
                if child.name() == "wandb-core":
                    child.kill()  # whoever waits for an answer of it gets an error
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
                self._on_failure(f"Weights & Biases has stopped, the run goes on without it: {reason}")

    # ── in the thread ───────────────────────────────────────────────────────────────────────────────────────

    def _init(self) -> None:
        offline = self._config.mode is WandbMode.offline
        # Read once, when wandb is imported or its service starts. `Settings(silent=True)` below is for the run alone:
        # what wandb says before and beside it (advice, offers) would go through the live view.
        os.environ.setdefault("WANDB_SILENT", "true")
        if offline:
            # Its error reports would go over the network.
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        # Where wandb keeps what is to be uploaded; by default a folder of the user's home, apart from the run.
        os.environ["WANDB_DATA_DIR"] = str(self._run_dir.wandb / "data")
        import wandb

        if not offline and not wandb.login(prompt=False, verify=False):
            # wandb.init would ask for the key at the terminal, behind the live view.
            raise VlmrlError(
                "monitor.wandb.mode=online requires a key, else nothing can be sent: "
                "run `wandb login`, set WANDB_API_KEY, or set monitor.wandb.mode=offline"
            )
        config: Any = None
        if self._run_dir.config.exists():
            config = redacted(OmegaConf.to_container(self._run_dir.read_config()))
        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            disable_code=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_disable_machine_info=True,
            x_transaction_log_flush_interval=FLUSH_EVERY,
        )
        self._run = wandb.init(
            project=self._config.project,
            name=self._config.name or self._run_dir.name,
            group=self._config.group,
            id=self._run_id(),
            resume=None if offline else "allow",
            mode=self._config.mode.value,
            dir=str(self._run_dir.path),
            config=config,
            settings=settings,
        )
        # The x axis is ours, not wandb's count of calls: an evaluation shares its step with the training step, and a
        # resumed run does some steps again.
        self._run.define_metric("*", step_metric="step")
        self._run.define_metric("warmup/*", step_metric="warmup/step")

    def _run_id(self) -> str:
        path = self._run_dir.wandb_run_id
        if path.exists():
            return path.read_text().strip()
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
        wandb.teardown(exit_code=exit_code)  # the service would stay until the interpreter ends


def strip(images: Sequence[ImageItem]) -> NDArray[np.uint8]:
    """The images side by side on white: uint8 [H, W, 3], H at most `MAX_HEIGHT`. At least one image."""
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
    """What the policy said, turn by turn."""
    return " / ".join(turn.text for turn in rollout.turns)
