"""From a composed config to a run: parse, check, execute.

    DictConfig ─▶ parse ─▶ fill ─▶ RunConfig ─┬─ dry_run=true ─▶ print the plan
                                      ├─ mode=check ─▶ tasks/check.py
                                      ├─ mode=preview ─▶ runs/preview/
                                      ├─ mode=play ─▶ runs/play/
                                      ├─ mode=compare ─▶ sweep/compare.py
                                      ├─ a server's Slurm task ─▶ runs/serve_slurm
                                      └─ else ─▶ check this machine ─▶ runs.lifecycle.execute

Torch is imported only in mode=preview, mode=play and the last two branches.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from omegaconf import DictConfig

from vlmrl.cli.sweep.compare import compare_and_show
from vlmrl.config.inference import VllmConfig
from vlmrl.config.parse import parse
from vlmrl.config.run import Mode, RunConfig
from vlmrl.config.task import ColorCodewordConfig
from vlmrl.preflight.auto_model import fill_model
from vlmrl.preflight.check import Stage, check
from vlmrl.ranks import slurm
from vlmrl.ranks.place import find_place
from vlmrl.record.files import disk_errors
from vlmrl.record.logs import MainLog
from vlmrl.record.run_dir import RunDir


def start(config: DictConfig, judge_changes: Callable[[], Sequence[str]] = list) -> float | None:
    """Check a composed config and run it; returns the objective for sweepers. Raises VlmrlError.

    `judge_changes` refuses values that a resumed run must not change, and returns sentences about the others. It is
    called after the checks, so that a config that cannot run at all gets the same message as in a new run. The
    sentences are printed before the run goes on, and written to its logs/main.log.
    """
    run_config, found = checked(config)
    if run_config.dry_run:
        judge_changes()
    if (code := answer_without_a_run(run_config, found)) is not None:
        if code != 0:
            raise SystemExit(code)
        return None
    print_unread(run_config)
    print_lines(found)
    if run_config.mode is Mode.compare:
        compare_runs(run_config)
        return None
    if (code := answer_without_weights(run_config)) is not None:
        if code != 0:
            raise SystemExit(code)
        return None
    if isinstance(run_config.inference, VllmConfig):
        slurm.divide_tasks(run_config.inference.slurm_tasks)
        if (index := slurm.server_index()) is not None:
            from vlmrl.runs.serve_slurm import serve

            check(run_config, Stage.here)
            serve(run_config, index)
            return None
    check(run_config, Stage.here)
    if notes := judge_changes():
        run_dir = RunDir(run_config.output_dir)
        with run_dir.lock(run_config.mode.name):  # before the log of a run that is still going is written to
            print_and_log(notes, run_dir)
    from vlmrl.runs.lifecycle import execute

    return execute(run_config)


def notes_on_unread(config: RunConfig) -> list[str]:
    """A sentence for `reward` and `task` where the mode does not read them. They are not refused, because one command
    line may serve several modes, as in a sweep over them.

    >>> from vlmrl.config.reward import ExactTerm, RewardConfig
    >>> notes_on_unread(RunConfig(mode=Mode.check, reward=RewardConfig({"exact": ExactTerm()})))
    ['reward has the terms exact, which mode=check does not read: it checks the task alone']
    """
    notes: list[str] = []
    why = {Mode.check: "it checks the task alone", Mode.compare: "it reads what the runs have recorded"}.get(
        config.mode
    )
    if (
        config.mode in (Mode.sft, Mode.dpo)
        and not config.orchestrator.eval.problems
        and not config.orchestrator.eval.sets
    ):
        why = "it scores no answer with orchestrator.eval.problems=0"
    if why is not None and config.reward.terms:
        terms = ", ".join(config.reward.terms)
        notes.append(f"reward has the terms {terms}, which mode={config.mode.name} does not read: {why}")
    if config.mode is Mode.compare and config.task.kind != ColorCodewordConfig().kind:
        notes.append(f"task.kind={config.task.kind} is not read with mode=compare: {why}")
    return notes


def print_unread(config: RunConfig) -> None:
    """Print `notes_on_unread`."""
    for note in notes_on_unread(config):
        print(f"note: {note}")


def print_and_log(notes: Sequence[str], run_dir: RunDir) -> None:
    """Print each note, and append it to logs/main.log of a run that exists. Raises VlmrlError."""
    with disk_errors(run_dir.logs):
        run_dir.logs.mkdir(exist_ok=True)
    with MainLog(run_dir.main_log):
        for note in notes:
            print(f"note: {note}")
            logging.getLogger(__name__).warning(note)


def checked(config: DictConfig) -> tuple[RunConfig, list[str]]:
    """Type a composed config, fill in what its checkpoint says, and check it → the config, and lines about what was
    found. Raises ConfigError."""
    run_config, found = fill_model(parse(config))
    check(run_config, Stage.composed)
    return run_config, found


def lead_or_follow(lead: Callable[[], int]) -> int:
    """Run `lead` on rank 0; the other ranks follow its commands. Returns the exit code."""
    if find_place().size == 1:
        return lead()
    from vlmrl.ranks.rank_group import init_from_environment
    from vlmrl.runs.lifecycle import follow_leader

    with init_from_environment() as group:
        assert group is not None
        return lead() if group.rank == 0 else follow_leader(group)


def print_lines(lines: Sequence[str]) -> None:
    """Print each line on its own."""
    for line in lines:
        print(line)


def answer_without_a_run(config: RunConfig, found: Sequence[str] = ()) -> int | None:
    """Print what `mode=check` or `dry_run=true` asks for and return the exit code; None if a run has to be started.
    `found` is what the checkpoint said.

    Raises ConfigError.
    """
    if config.mode is Mode.check:
        from vlmrl.preflight.rules.reward import all_tasks
        from vlmrl.tasks.check import print_findings

        print_unread(config)
        return print_findings(all_tasks(config))
    if config.dry_run:
        from vlmrl.preflight.estimate.plan import dry_run

        print_unread(config)
        print_lines(found)
        print(dry_run(config))
        return 0
    return None


def answer_without_weights(config: RunConfig) -> int | None:
    """Run `mode=preview` or `mode=play`, which need a renderer and no engine, and return the exit code; None for other
    modes. Raises VlmrlError."""
    if config.mode is Mode.preview:
        from vlmrl.runs.preview.preview import preview

        return preview(config)
    if config.mode is Mode.play:
        from vlmrl.runs.play.play import play

        return play(config)
    return None


def compare_runs(config: RunConfig) -> None:
    """Run `mode=compare`. The comparison of a single multirun is written into the multirun's own folder, any other into
    the folder of this run."""
    into = Path(config.output_dir)
    if len(config.runs) == 1 and not RunDir(config.runs[0]).config.exists():
        with contextlib.suppress(OSError):
            into.rmdir()  # Hydra made it
        into = Path(config.runs[0])
    compare_and_show(config.runs, into)
