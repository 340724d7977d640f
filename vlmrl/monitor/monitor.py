"""Monitor: receives the metrics and rollouts of a run and passes them on.

    Monitor ─┬─▶ metrics.jsonl, supervised.jsonl     at once, a whole line
             ├─▶ faults.jsonl, bad_rows.jsonl        at once, whole lines
             ├─▶ rollouts/, images/                  in a background thread (record/rollouts.py)
             ├─▶ the screen                          live view or plain lines (progress.py)
             ├─▶ wandb/, tensorboard/                in background threads (loggers.py)
             ├─▶ logs/main.log                       Python's logging and warnings (record/logs.py)
             ├─▶ summary.json                        at the end, however the run ends
             └─▶ report.html                         in a separate process (report/), after evaluations and at the end

Wall-clock time adds up over resumes. `time/elapsed` on each line of metrics.jsonl is the seconds since the Monitor was
entered plus those of earlier segments: as summary.json says where a segment ended normally, and up to its last line
where it was killed. Steps that a resumed run repeats count both times.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from vlmrl.config.algorithm import Credit
from vlmrl.config.monitor import BlindGuard, MonitorConfig
from vlmrl.errors import VlmrlError, format_error, headline
from vlmrl.monitor.closing import closing_table, readable
from vlmrl.monitor.glimpse import SHOWN, pick
from vlmrl.monitor.health import EQUAL_COMPARED, HISTORY, is_blind, warnings_for
from vlmrl.monitor.loggers import Loggers
from vlmrl.monitor.progress import PHASES, Progress
from vlmrl.monitor.report.background import ReportWriter
from vlmrl.monitor.screen import lost_streams
from vlmrl.monitor.tensorboard_logger import TensorboardLogger
from vlmrl.monitor.wandb_logger import WandbLogger
from vlmrl.record.bad_rows import BadRowLog, BadRowRecord
from vlmrl.record.faults import FaultLog, FaultRecord, faults_of
from vlmrl.record.files import disk_errors
from vlmrl.record.in_place import Folders
from vlmrl.record.logs import MainLog
from vlmrl.record.metrics import (
    ELAPSED,
    EVAL_GREEDY,
    EVAL_SAMPLED,
    ZERO_ADVANTAGE,
    MetricsLog,
    Record,
    read_metrics,
)
from vlmrl.record.rollouts import RolloutRecorder
from vlmrl.record.run_dir import RunDir
from vlmrl.record.splits import RecordedSplit, label_of
from vlmrl.types import Group, Rollout

log = logging.getLogger(__name__)

NO_REPORT_IN_A_HURRY = "report.html was left out, as asked: write it with python -m vlmrl mode=report run={folder}"
NO_REPORT = "report.html could not be written: read logs/report.log for the reason."


class Recorded(NamedTuple):
    """How many steps and evaluations this process has recorded completely."""

    steps: int = 0
    supervised_steps: int = 0
    evaluations: int = 0


class Monitor:
    """Records and shows a run. A context manager: leaving it closes everything, also after an exception.

    The run directory must exist. All methods are called from one thread, and all of them raise VlmrlError when a file
    cannot be written.
    """

    def __init__(
        self, config: MonitorConfig, run_dir: RunDir, *, total_steps: int, exact: bool, credit: Credit
    ) -> None:
        """`total_steps`: RL steps of the whole run, for the progress bar. `exact`: engine and trainer both compute in
        float32, so that their logprobs may differ only by rounding. `credit`: which rewards the advantages compare."""
        self.recorded = Recorded()
        """A step that failed while it was recorded does not count, so a checkpoint of it would lack its record."""
        self.data: Mapping[str, Any] = {}
        """What the run has read, for summary.json."""
        self._exact = exact
        self._credit = credit
        self._config = config
        self._run_dir = run_dir
        self._progress = Progress(name=run_dir.name, total_steps=total_steps, live=config.live)
        self._loggers = Loggers(
            WandbLogger(config.wandb, run_dir, on_failure=self.warn),
            TensorboardLogger(config.tensorboard, run_dir, on_failure=self.warn),
        )
        self._history: deque[Record] = deque(maxlen=HISTORY)
        self._report = ReportWriter(run_dir) if config.report else None
        self._warned: list[str] = []
        self._trained_on: Sequence[Rollout] = ()  # one rollout per group of the newest step
        self._evaluation: Record = {}  # the line of metrics.jsonl with the newest evaluation
        self._supervised: MetricsLog | None = None
        self._faults = FaultLog(run_dir.faults)
        self._bad_rows = BadRowLog(run_dir.bad_rows)
        self._elapsed_before = 0.0  # seconds of earlier segments
        self._finished = False
        self._stack = ExitStack()

    def __enter__(self) -> Monitor:
        self._entered = time.monotonic()
        with ExitStack() as stack:
            self._main_log = stack.enter_context(MainLog(self._run_dir.main_log))
            damaged: list[str] = []
            self._metrics = MetricsLog(self._run_dir.metrics, damaged.append)
            stack.callback(self._metrics.close)
            stack.callback(self._close_supervised)
            self._folders = Folders(self._run_dir.folders)
            stack.callback(self._folders.close)
            self._recorder = RolloutRecorder(self._run_dir, self._config.max_rollouts_mib)
            stack.callback(self._recorder.close)
            stack.callback(self._loggers.finish, 1)  # exit code 1: does nothing if `finish` was called
            stack.callback(self._progress.stop)
            self._progress.start()
            for text in damaged:
                self.warn(text)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._stack.close()
            return
        log.error("the run ended with an exception\n%s", format_error(error).rstrip())
        try:
            with self._stack:
                if not self._finished:
                    interrupted = isinstance(error, KeyboardInterrupt)
                    self.finish("interrupted" if interrupted else "error", {"error": headline(error)})
        except VlmrlError as second:
            error.add_note(f"While closing: {second}")  # the first error is the one to report

    # ── before the first step ───────────────────────────────────────────────────────────────────────────────

    def table(self, title: str, lines: Mapping[str, str], hidden: Sequence[str] = ()) -> None:
        """Print a table that stays on the screen, e.g. "plan": {"rollouts per step": "8 groups × 32 = 256"}. Lines
        whose keys are `hidden` are secrets, which are not logged."""
        self._progress.table(title, lines)
        for key, value in lines.items():
            if key not in hidden:
                log.info("%s: %s: %s", title, key, value)

    def expect(self, total_steps: int) -> None:
        """Set the RL steps of the whole run, for the progress bar, once the task has said how many rows it has."""
        self._progress.expect(total_steps)

    def phase(self, name: str) -> None:
        """Set the current phase, one of `PHASES`."""
        assert name in PHASES, name
        self._main_log.take_over()  # handlers of libraries that were imported meanwhile
        if name not in ("preparing", "doctor", "bench", "replay"):
            # Not earlier: importing their packages would slow down the main thread's imports.
            self._loggers.start()
        self._progress.phase(name)
        log.info("phase: %s", name)

    def spell_with(self, tokenizer: Any) -> None:
        """Record the spelling of the rollouts' tokens with this tokenizer of transformers."""
        self._recorder.spell_with(tokenizer)

    def status(self, text: str) -> None:
        """Show what the run waits for, until the next phase. It is printed at most every few seconds and not logged."""
        self._progress.status(text)

    def resume_at(self, step: int, *, supervised_steps: int) -> None:
        """Remove what was recorded after the checkpoint of `step`, which contains so many supervised steps, because
        the run repeats those steps."""
        summary = self._run_dir.read_summary(self.warn) or {}
        recorded = self._metrics.last or {}
        self._elapsed_before = max(summary.get("wall_clock_s") or 0.0, recorded.get(ELAPSED) or 0.0)
        self._metrics.truncate_after(step)
        for records in (self._faults, self._bad_rows):
            records.cut_back(supervised_steps=supervised_steps, step=step)
        self._recorder.resume_at(step)
        self._loggers.resume_at(step, supervised_steps=supervised_steps)
        with disk_errors(self._run_dir.summary):
            self._run_dir.summary.unlink(missing_ok=True)  # it means that a run has ended, and this one goes on
        history = read_metrics(self._run_dir.metrics, self.warn)
        self._evaluation = next((line for line in reversed(history) if line.get(EVAL_SAMPLED) is not None), {})
        self._history.extend(history)
        self._progress.resume(history)
        log.info("resumed at step %d", step)

    # ── during the run ──────────────────────────────────────────────────────────────────────────────────────

    def warmup(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        """Record supervised step 1 … total in supervised.jsonl. A repeated step replaces the lines from it on."""
        if self._supervised is None:
            self._supervised = MetricsLog(self._run_dir.supervised, self.warn)
        if self._supervised.last is not None and step <= self._supervised.last["step"]:
            self._supervised.truncate_after(step - 1)
        record = {"step": step, **metrics, ELAPSED: self._elapsed()}
        self._supervised.write(record)
        self._progress.warmup(step, total, metrics)
        self._loggers.log({f"warmup/{key}": value for key, value in record.items()})
        self._note_lost_screen()
        self.recorded = self.recorded._replace(supervised_steps=self.recorded.supervised_steps + 1)
        self._keep_in_place()

    def faults(self, faults: Sequence[FaultRecord]) -> None:
        """Append to faults.jsonl what went wrong with demonstrations. Faults of rollouts are recorded by `step`,
        `record` and `evaluation`."""
        self._faults.write(faults)

    def bad_rows(self, rows: Sequence[BadRowRecord]) -> None:
        """Append to bad_rows.jsonl rows of the data that cannot be used."""
        self._bad_rows.write(rows)
        self.warn(
            "Some rows of the data cannot be used and are passed over: python -m vlmrl mode=faults "
            f"run={readable(self._run_dir.path)} lists them."
        )

    def step(self, step: int, metrics: Mapping[str, float], groups: Sequence[Group] | None) -> None:
        """Record one optimizer step: a line of metrics.jsonl, and a file of its rollouts, which must not change again.
        None: the step has none, because it learns from pairs.

        Adds `groups/zero_advantage` and `time/elapsed` to the metrics.
        """
        record: Record = {"step": step, **metrics, ELAPSED: self._elapsed()}
        if groups:
            record[ZERO_ADVANTAGE] = sum(map(_has_no_advantage, groups)) / len(groups)
        self._metrics.write(record)
        self._loggers.start()
        self._loggers.log(record)
        if groups is not None:
            self.record(step, groups)
        self._history.append(dict(self._metrics.last or record))  # as written: numbers that are not finite are None
        if groups:
            self._history[-1][EQUAL_COMPARED] = sum(group.compares_equal for group in groups) / len(groups)
        if groups is not None:
            self._trained_on = [group.rollouts[0] for group in groups]
            self._progress.rollouts(f"rollouts of step {step}", pick(groups))
        self._progress.step(step, self._history[-1])
        for text in warnings_for(self._history, exact=self._exact, credit=self._credit, config=self._config):
            self.warn(text)
        self._note_lost_screen()
        self.recorded = self.recorded._replace(steps=self.recorded.steps + 1)
        self._keep_in_place()

    @property
    def ends_blind(self) -> bool:
        """Whether `monitor.blind_guard=stop` ends the run: the reward rises although the policy ignores its images."""
        return self._config.blind_guard is BlindGuard.stop and is_blind(self._history, self._config)

    def record(self, step: int, groups: Sequence[Group]) -> None:
        """Record only the rollouts of a step, after which the run ends with an error."""
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        self._faults.write(faults_of(step, "rl", rollouts))
        if self._config.record_rollouts:
            self._recorder.write(step, {"train": rollouts})

    def evaluation(
        self, step: int, metrics: Mapping[str, float], rollouts: Mapping[RecordedSplit, Sequence[Rollout]]
    ) -> None:
        """Record an evaluation of the weights after `step`; may be called before or after `Monitor.step` for that step.

        The metrics (`eval/…`) join the step's line in metrics.jsonl; the rollouts go into a file, under their splits.
        """
        for group in rollouts.values():
            self._faults.write(faults_of(step, "eval", group))
        self._metrics.write({"step": step, **metrics, ELAPSED: self._elapsed()})
        if EVAL_SAMPLED in metrics:
            self._evaluation = self._metrics.last or {}
        self._loggers.start()
        self._loggers.log({"step": step, **metrics})
        of_splits = {label_of(split): group for split, group in rollouts.items()}
        self._loggers.log_rollouts(step, {"trained on": self._trained_on, **of_splits})
        if self._config.record_rollouts:
            self._recorder.write(step, rollouts)
        shown: Sequence[Rollout] = next(iter(rollouts.values()), ())
        self._progress.rollouts(f"held-out rollouts after step {step}", shown[:SHOWN])
        if self._report is not None and not self._report.start():
            self.warn(NO_REPORT)
        self._progress.evaluation(step, metrics)
        log.info("evaluation after step %d: %s", step, dict(metrics))
        self._note_lost_screen()
        self.recorded = self.recorded._replace(evaluations=self.recorded.evaluations + 1)
        self._keep_in_place()

    def checkpoint(self, step: int, folder: Path) -> None:
        """Log a complete checkpoint (`monitor.wandb.checkpoints`). Do not delete it before this returns."""
        self._loggers.log_checkpoint(step, folder)

    def warn(self, text: str) -> None:
        """Report a warning in the log, on the screen and in summary.json. The same text is reported only once."""
        if text not in self._warned:
            self._warned.append(text)
            log.warning(text)
            if not self._finished:  # the view has ended
                self._progress.warn(text)

    def _keep_in_place(self) -> None:
        """Write again what was removed under the run, with a warning. Raises VlmrlError for a file that cannot be
        written again. Call it when a step is recorded completely: the run that ends by it is saved with that step."""
        for records in (self._metrics, self._supervised, self._faults, self._bad_rows):
            if records is not None:
                records.check_in_place()
        for folder in self._folders.make_again():
            self.warn(f"{folder} was removed or replaced under the run: from here on it is written to again.")
        if self._run_dir.keep_config():
            self.warn(f"{self._run_dir.config} was removed or changed under the run: it is written again, unchanged.")

    def _note_lost_screen(self) -> None:
        for text in lost_streams():
            log.warning(text)

    # ── the end ─────────────────────────────────────────────────────────────────────────────────────────────

    def flush_lines(self) -> Callable[[], None]:
        """Wait until the lines recorded so far are on the disk → a function that waits, in any thread, until rollouts
        and images are there as well, and raises VlmrlError where they cannot be. A checkpoint needs both.
        """
        self._metrics.flush()
        if self._supervised is not None:
            self._supervised.flush()
        self._faults.flush()
        self._bad_rows.flush()
        return self._recorder.so_far()

    def finish(self, exit_reason: str, summary: Mapping[str, Any], hurries: Callable[[], bool] = lambda: False) -> None:
        """Write summary.json (`summary` and the newest metrics) and report.html, and print how the run ended.

        The run has ended when summary.json is there: once `hurries` returns True, the page is left out.
        """
        if exit_reason != "error":
            self._keep_in_place()
        self._finished = True
        self._loggers.finish(exit_code=1 if exit_reason == "error" else 0)
        last = self._metrics.last or {}
        self._run_dir.write_summary(
            {
                "exit_reason": exit_reason,
                "wall_clock_s": self._elapsed(),
                "step": last.get("step", 0),
                EVAL_SAMPLED: self._evaluation.get(EVAL_SAMPLED),
                EVAL_GREEDY: self._evaluation.get(EVAL_GREEDY),
                **summary,
                **self.data,
                "warnings": self._warned,
                "metrics": last,
            }
        )
        self._progress.stop()
        closing = closing_table(self._run_dir, exit_reason, self._elapsed(), last, self._evaluation)
        log.info("finished: %s", exit_reason)
        self._note_lost_screen()
        try:
            self._recorder.flush()
            if self._report is not None and not self._report.finish(hurries):
                text = NO_REPORT_IN_A_HURRY.format(folder=readable(self._run_dir.path)) if hurries() else NO_REPORT
                self._progress.warn(text)
                log.warning(text)
            elif self._report is not None:
                closing["report"] = readable(self._run_dir.report)
        finally:
            self._progress.table("run", closing)

    def _elapsed(self) -> float:
        return self._elapsed_before + time.monotonic() - self._entered

    def _close_supervised(self) -> None:
        if self._supervised is not None:
            self._supervised.close()


def _has_no_advantage(group: Group) -> bool:
    return all(turn.advantage == 0.0 for rollout in group.rollouts for turn in rollout.turns)
