"""`mode=preview`: draw, render and score problems as a run would, and say what is wrong with them before a run.

    task ─▶ sample.py ─▶ grading.py ─▶ checks.py ─▶ findings ─┬─▶ the screen
                │            (answers.py: the model's)         ├─▶ preview.json
                └─────────────────────────────────────────────┴─▶ preview.html

`row=417` shows one row and scores the answers that one types (one_row.py). No GPU is needed; only the model's own
answers load weights, and `preview.answers=0` leaves them out. Exit code 1: something was found.
"""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

from vlmrl.config.dataset import DatasetConfig
from vlmrl.config.run import RunConfig
from vlmrl.config.task import MixtureConfig
from vlmrl.errors import ConfigError
from vlmrl.models.checkpoints.load import resolve_checkpoint
from vlmrl.preflight.rules.video import rows_are_shown
from vlmrl.record.run_dir import RunDir
from vlmrl.runs.build import RenderingParts, build_renderer
from vlmrl.runs.preview.answers import answers_now
from vlmrl.runs.preview.checks import Seen, findings_of
from vlmrl.runs.preview.grading import Grader
from vlmrl.runs.preview.image_roots import images_not_found
from vlmrl.runs.preview.one_row import show_row
from vlmrl.runs.preview.page import write_page
from vlmrl.runs.preview.result import Preview
from vlmrl.runs.preview.sample import Looker, Sample
from vlmrl.runs.preview.screen import print_preview
from vlmrl.runs.preview.summary import write_json
from vlmrl.runs.tools import texts_of_run
from vlmrl.tasks.base import Split, Task
from vlmrl.tasks.border import get_num_rows
from vlmrl.tasks.loading import data_table_of, load_task
from vlmrl.types import Modality

SHOWN = 8
"""Problems of the page, with pictures and tokens."""

PROGRESS_EVERY_S = 5.0
"""Seconds between two lines about a scan."""


def preview(config: RunConfig) -> int:
    """Show the preview of a run and return the exit code. Raises ConfigError."""
    task = load_task(config.task, seed=config.seed)
    rows_are_shown(config, task)
    folder = resolve_checkpoint(config.model, texts_of_run(config, task))
    parts = build_renderer(config, folder)
    if config.row is not None:
        return asyncio.run(show_row(config, task, parts, RunDir(config.output_dir)))
    seen = asyncio.run(_look_at(config, task, parts, folder))
    run_dir = RunDir(config.output_dir)
    write_json(run_dir.preview_json, seen)
    write_page(run_dir.preview_page, seen)
    print_preview(seen, run_dir)
    return int(bool(seen.findings))


async def _look_at(config: RunConfig, task: Task, parts: RenderingParts, folder: Path) -> Preview:
    def count_tokens(text: str) -> int:
        return len(parts.tokenizer.encode(text, add_special_tokens=False)) + 1

    if config.full and get_num_rows(task, "train") is None:
        raise ConfigError(
            f"full=true: {type(task).__name__} has no end (num_rows), so it cannot be seen as a whole: drop full=true, "
            "and set preview.problems to the number of problems to look at"
        )
    looker = Looker(task, parts.renderer, Grader(config, task), count_tokens, config.preview.problems)
    samples: dict[Split, Sample] = {}
    for split in ("train", "eval"):
        count = None if config.full and get_num_rows(task, split) is not None else config.preview.problems
        samples[split] = await looker.look(split, count, SHOWN if split == "train" else 0, ScanProgress(split))
    refused = [each for sample in samples.values() for each in sample.refused]
    findings = findings_of(Seen(config, samples, images_not_found(refused, *_folders(config))))
    asked = [each for each in samples["train"].problems if each.prompt is not None][: config.preview.answers]
    answers, reason = await answers_now(config, task, parts.renderer, folder, asked)
    return Preview(config, data_table_of(task), samples, answers, reason, findings, parts)


def _folders(config: RunConfig) -> tuple[dict[Modality, Path | None], Path]:
    """`task.image_root` and `task.video_root`, and the folder of the data; those of the first data set of a mixture."""
    tasks = config.task.tasks.values() if isinstance(config.task, MixtureConfig) else [config.task]
    task = next((each for each in tasks if isinstance(each, DatasetConfig)), None)
    if task is None:
        return {"image": None, "video": None}, Path.cwd()
    first = task.path[0] if isinstance(task.path, list) and task.path else task.path
    path = Path(str(first)).expanduser().absolute()
    roots: dict[Modality, str | None] = {"image": task.image_root, "video": task.video_root}
    starts = {kind: None if root is None else Path(root).expanduser().absolute() for kind, root in roots.items()}
    return starts, path if path.is_dir() else path.parent


class ScanProgress:
    """Says from time to time how far a scan is."""

    def __init__(self, split: str) -> None:
        self._split = split
        self._said = time.monotonic()

    def __call__(self, done: int, total: int | None) -> None:
        if time.monotonic() - self._said > PROGRESS_EVERY_S:
            self._said = time.monotonic()
            of = f" of {total:,}" if total is not None else ""
            print(f"{done:,}{of} rows of the {self._split} split", file=sys.stderr, flush=True)
