"""Log to TensorBoard: the metrics of metrics.jsonl as scalars, and a few rollouts with their images at each evaluation.

    tensorboard/            optimizer steps and evaluations, by step
    tensorboard/warmup/     supervised steps, by supervised step

tensorboard is an extra (`pip install 'vlmrl[tensorboard]'`); `tensorboard --logdir outputs` shows all runs. A resumed
run writes another event file, which begins by telling TensorBoard to drop the steps that the run repeats.

Left out on purpose: checkpoints, graphs, histograms (TensorBoard has no place for the first, and the run directory has
every token).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from vlmrl.config.monitor import TensorboardConfig
from vlmrl.config.parse import literal
from vlmrl.config.secrets import redacted
from vlmrl.monitor.loggers import BackgroundLogger, last_items, said, strip
from vlmrl.record.run_dir import RunDir
from vlmrl.types import Rollout

WARMUP = "warmup/"
"""Prefix of the metrics of supervised steps, which have steps of their own."""


class TensorboardLogger(BackgroundLogger):
    """Writes event files with the writer of torch."""

    name = "TensorBoard"

    def __init__(self, config: TensorboardConfig, run_dir: RunDir, on_failure: Callable[[str], None]) -> None:
        super().__init__(on_failure, rollouts=config.rollouts, is_enabled=config.enabled)
        self._run_dir = run_dir
        self._writers: dict[str, Any] = {}
        self._first: dict[str, int | None] = {"": None, WARMUP: None}
        """The first step that is written, where the run is resumed."""

    def resume_at(self, step: int, *, supervised_steps: int) -> None:
        self._first = {"": step + 1, WARMUP: supervised_steps + 1}

    # ── called in the background thread ─────────────────────────────────────────────────────────────────────

    def _init(self) -> None:
        if self._run_dir.config.exists():
            config = redacted(literal(self._run_dir.read_config()))
            lines = OmegaConf.to_yaml(OmegaConf.create(config)).splitlines()
            self._writer("").add_text("config", "\n".join(f"    {line}" for line in lines), self._first[""] or 0)

    def _writer(self, kind: str) -> Any:
        """The writer of optimizer steps ("") or of supervised steps (`WARMUP`)."""
        if kind not in self._writers:
            from torch.utils.tensorboard import SummaryWriter

            folder = self._run_dir.tensorboard / kind
            self._writers[kind] = SummaryWriter(str(folder), purge_step=self._first[kind])
        return self._writers[kind]

    def _log(self, metrics: dict[str, Any]) -> None:
        kind = WARMUP if all(key.startswith(WARMUP) for key in metrics) else ""
        writer, step = self._writer(kind), metrics[f"{kind}step"]
        for key, value in metrics.items():
            if key != f"{kind}step" and math.isfinite(value):
                writer.add_scalar(key.removeprefix(kind), value, step)
        writer.flush()  # a killed run has lost nothing

    def _log_rollouts(self, step: int, named: list[tuple[str, Rollout]]) -> None:
        writer = self._writer("")
        numbers: dict[str, int] = {}
        for kind, rollout in named:
            numbers[kind] = numbers.get(kind, 0) + 1
            tag = f"rollouts, {kind}/{numbers[kind]}"
            if items := last_items(rollout):
                writer.add_image(tag, strip(items), step, dataformats="HWC")
            writer.add_text(tag, as_markdown(rollout), step)
        writer.flush()

    def _log_checkpoint(self, step: int, folder: Path) -> None:
        pass

    def _finish(self, exit_code: int) -> None:
        for writer in self._writers.values():
            writer.close()


def as_markdown(rollout: Rollout) -> str:
    """What the text of a rollout shows. Every line is indented by four spaces, so that Markdown leaves it as it is."""
    dropped = f", dropped: {rollout.dropped}" if rollout.dropped else ""
    head = f"{rollout.rollout_id}, problem {rollout.problem_id}"
    lines = [head, f"reward {rollout.reward:g}, {rollout.stop_reason}{dropped}", "", *said(rollout).splitlines()]
    return "\n".join(f"    {line}" for line in lines)
