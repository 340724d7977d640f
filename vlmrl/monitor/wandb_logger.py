"""Log to Weights & Biases: the metrics of metrics.jsonl, a table of rollouts with their images at each evaluation, and
on request the checkpoints as artifacts.

wandb is an extra (`pip install 'vlmrl[wandb]'`). It runs in one background thread, because importing it and starting
its service takes more than a second. Offline it uses no network; `wandb sync <run directory>/wandb/offline-run-*`
uploads the run later. A resumed run keeps its run id and writes another offline folder (`wandb sync --append`). The
files that a table or an artifact refers to stay in wandb/data until they are synced, so do not move a run directory
before it is synced.

The service process ends with the run: `finish` stops it, and it exits by itself when the run's process is gone.

Left out on purpose: system metrics, console capture, upload of code and git state (the run directory has them).
"""

from __future__ import annotations

import importlib.util
import os
import secrets
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from vlmrl.config.monitor import WandbConfig, WandbMode
from vlmrl.config.parse import literal
from vlmrl.config.secrets import redacted
from vlmrl.errors import VlmrlError
from vlmrl.monitor.loggers import BackgroundLogger, last_items, said, strip
from vlmrl.record.files import write_bytes_atomically
from vlmrl.record.run_dir import RunDir
from vlmrl.types import Rollout

FLUSH_EVERY_S = 1.0
"""A killed run loses at most this many seconds of wandb's own file (metrics.jsonl loses nothing)."""
COLUMNS = ("kind", "rollout", "problem", "images", "said", "reward", "stop_reason", "dropped")
"""Columns of the table of rollouts; `images` shows all images and videos of the last prompt side by side."""


def settle_wandb(config: WandbConfig) -> WandbConfig:
    """Replace `mode=auto`: by `offline` where wandb is installed, else by `disabled`. Other modes stay."""
    if config.mode is not WandbMode.auto:
        return config
    installed = importlib.util.find_spec("wandb") is not None
    return replace(config, mode=WandbMode.offline if installed else WandbMode.disabled)


class WandbLogger(BackgroundLogger):
    """Logs with the installed wandb."""

    name = "Weights & Biases"

    def __init__(self, config: WandbConfig, run_dir: RunDir, on_failure: Callable[[str], None]) -> None:
        self._config = settle_wandb(config)
        is_enabled = self._config.mode is not WandbMode.disabled
        super().__init__(on_failure, rollouts=config.rollouts, is_enabled=is_enabled)
        self._run_dir = run_dir
        self._run: Any = None

    def _give_up(self) -> None:
        for child in psutil.Process().children():
            if child.name() == "wandb-core":
                child.kill()  # the background thread then gets an error instead of waiting on

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
        self._run.log(metrics)

    def _log_rollouts(self, step: int, named: list[tuple[str, Rollout]]) -> None:
        import wandb

        table = wandb.Table(columns=list(COLUMNS))
        for kind, rollout in named:
            items = last_items(rollout)
            table.add_data(
                kind,
                rollout.rollout_id,
                rollout.problem_id,
                wandb.Image(strip(items)) if items else None,
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
