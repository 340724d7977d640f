"""A run from its checked config to its end.

    execute ─┬─ rank 0 ──▶ lead: settle ─▶ run directory ─▶ build ─▶ start engine ─▶ restore ─▶ mode ─▶ save ─▶ summary
             └─ others ──▶ follow_leader: work for rank 0 until it ends

However a run ends, it can be continued: the files on disk are complete at every moment, and everything random is a
function of the config and the step, so a step that runs again gives the same result.
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from vlmrl.config.parse import parse, typed
from vlmrl.config.run import Mode, RunConfig
from vlmrl.config.task import most_turns
from vlmrl.errors import CheckpointError, ConfigError, Interrupted, RankError, VlmrlError
from vlmrl.models.nf4 import in_4_bits
from vlmrl.monitor.monitor import Monitor
from vlmrl.orchestrator.interruption import stopped_before
from vlmrl.orchestrator.loop import ExitReason
from vlmrl.preflight.settle import settle
from vlmrl.ranks.rank_group import RankGroup, follow, init_from_environment
from vlmrl.record.bad_rows import read_bad_rows
from vlmrl.record.lock import network_file_system
from vlmrl.record.run_dir import RunDir
from vlmrl.runs.build import Run, build_run
from vlmrl.runs.data_record import data_of, same_data
from vlmrl.runs.dtypes import is_float32
from vlmrl.runs.every_rank import RunFollower
from vlmrl.runs.modes import MODES, ModeWithoutRun, RunMode
from vlmrl.runs.position import Cursors, Position
from vlmrl.runs.saving import loop_state, save
from vlmrl.runs.stopping import ignore_the_launcher, rank_lost, stopping_on_signals
from vlmrl.trainer.loop_state import LoopState

log = logging.getLogger(__name__)


def execute(config: RunConfig) -> float | None:
    """Run `config` and return the objective for sweepers: the last sampled held-out reward, None without evaluation.

    In a rank group, rank 0 leads; the other ranks work for it until it is done and return None. Raises `VlmrlError`s.
    """
    with init_from_environment() as rank_group:
        if rank_group is None or rank_group.rank == 0:
            return lead(config, rank_group)
        if follow_leader(rank_group) != 0:
            raise RankError(f"rank {rank_group.rank} ended early; rank 0 reports the reason")
        return None


def follow_leader(rank_group: RankGroup) -> int:
    """Work for rank 0 until it ends; returns this process's exit code."""
    return follow(rank_group, RunFollower(rank_group))


def lead(config: RunConfig, rank_group: RankGroup | None) -> float | None:
    """Run `config`, which preflight has checked, as the only process or as rank 0; returns the objective."""
    mode = MODES[config.mode]
    if isinstance(mode, ModeWithoutRun):
        mode.run(dataclasses.replace(config, model=dataclasses.replace(config.model, device=mode.device)))
        return None
    config, notes = settle(config)
    config = mode.settings(config)
    with run_dir_of(config, mode).lock(config.mode.name):
        return lead_run(config, mode, notes, rank_group)


def lead_run(config: RunConfig, mode: RunMode, notes: Sequence[str], rank_group: RankGroup | None) -> float | None:
    """Run `config` in its folder, whose lock this process holds; returns the objective."""
    run_dir = open_run_dir(config, mode)
    with Monitor(
        config.monitor,
        run_dir,
        total_steps=config.trainer.max_steps,
        exact=is_float32(config),
        credit=config.algorithm.credit,
    ) as monitor:
        if (file_system := network_file_system(run_dir.path)) is not None:
            log.info(
                "%s is on %s: its lock reaches other hosts only where the server has locks", run_dir.path, file_system
            )
        monitor.phase("preparing")
        for note in notes:
            monitor.warn(note)
        with exits_are_errors():
            with same_data(config, run_dir) as hub_commits:
                run = build_run(config, run_dir, monitor, rank_group)
            monitor.expect(run.steps)
            monitor.table("plan", plan_table(run))
            if data := data_of(run):
                monitor.table("data", data)
                monitor.data = {"data": data} | ({"hub_commits": hub_commits} if hub_commits else {})
            # The imported libraries hold about a million objects for as long as the run lives. Frozen, they are not
            # scanned again at every garbage collection.
            gc.freeze()
            try:
                reason, objective = asyncio.run(carry_out(run, mode))
            finally:
                gc.unfreeze()  # the next run of a sweep needs this run's memory
    if reason == "interrupted":
        run.stop.requeue()
        raise Interrupted(mode.interrupted.format(progress=run.progress, folder=config.output_dir))
    return objective


@contextmanager
def exits_are_errors() -> Iterator[None]:
    """Turn `sys.exit` of a task or a library inside the block into an error: the run would end with that exit code,
    perhaps 0, as if it had finished."""
    try:
        yield
    except SystemExit as stop:
        raise RuntimeError(f"sys.exit({stop.code!r}) was called inside the run, which had not finished") from stop


def run_dir_of(config: RunConfig, mode: RunMode) -> RunDir:
    """The directory that the run writes into."""
    folder = Path(config.output_dir)
    if config.resume is None or mode.continues_run(config):
        return RunDir(folder)
    of_checkpoint = "" if config.step is None else f"_step_{config.step:06d}"
    return RunDir(folder / f"{mode.folder_in_resumed_run}{of_checkpoint}")


def open_run_dir(config: RunConfig, mode: RunMode) -> RunDir:
    """Create the run directory, write config.yaml, and point `latest` at it. Raises ConfigError.

    A run that continues another writes config.yaml later, once its checkpoint is restored (`restore`).
    """
    run_dir = run_dir_of(config, mode)
    run_dir.create(resume=config.resume is not None or mode.is_inside_past_run)
    if not mode.continues_run(config):
        run_dir.write_config(config)
    if not mode.reads_past_run(config):
        run_dir.point_latest()
    return run_dir


async def carry_out(run: Run, mode: RunMode) -> tuple[ExitReason, float | None]:
    """Start the engine, restore, run the mode, save and write the summary.

    Returns why the run ended and the last sampled held-out reward. Whatever ends the run early, also a bug of ours, its
    last finished step is saved before the error goes on.
    """
    with ExitStack() as handlers:
        try:
            await run.engine.start()
            handlers.enter_context(stopping_on_signals(run.stop, run.monitor.warn, mode.checkpoint_step is not None))
            with rank_lost(run.rank_group) as lost:
                restore(run, mode)
                work = asyncio.create_task(mode.run(run))
                try:
                    if await stopped_before(work, lost):
                        assert run.rank_group is not None
                        raise RankError(run.rank_group.lost)
                    reason = work.result()
                except RankError:  # all ranks are needed to save
                    raise
                except (Exception, asyncio.CancelledError) as error:
                    save_after(error, run, mode)
                    raise
                save_at_the_end(run, mode)
        except RankError as error:
            ignore_the_launcher()
            # Now, not when the Monitor closes: a collective that hangs in another thread may keep this process from it.
            run.monitor.finish("error", {"error": f"RankError: {error}"})
            raise
        finally:
            try:
                await stop_envs(run)
                await run.engine.stop()
            finally:
                run.weight_sync.close()
        objective = run.evaluator.history[-1][0] if run.evaluator.history else None
        was_asked = run.stop.number is not None
        run.monitor.finish(
            reason,
            {"policy_version": run.trainer.version, "objective": objective},
            hurries=lambda: run.stop.number is not None and not was_asked,
        )
    return reason, objective


async def stop_envs(run: Run) -> None:
    """Close the envs that are left, and end the worker processes of all tasks."""
    runners = (run.evaluator.runner, *(player.runner for player in run.evaluator.sets))
    await asyncio.gather(*(envs.stop() for envs in {runner.envs for runner in runners}))


def restore(run: Run, mode: RunMode) -> None:
    """Load the newest complete checkpoint of the run that `resume=` names, or the one of `step`; without `resume=`, do
    nothing.

    Raises `CheckpointError` where every checkpoint is damaged or of another model, `ConfigError` where the mode needs
    a checkpoint and there is none.
    """
    if run.config.resume is None:
        return
    found = run.checkpoints.load_chosen(run.config.step, run.trainer, run.monitor.warn)
    if found is not None:
        run.restored_step, state = found
        run.evaluator.history = list(state.evaluations)
        count = state.evaluation_count
        run.evaluator.count = len(state.evaluations) if count is None else count
        run.evaluator.best.restore(state.best)
        run.evaluator.is_unfinished = state.is_evaluation_unfinished
        run.saved = run.begun = run.progress
        if mode.continues_run(run.config):
            restore_position(run, state)
            run.checkpoints.tidy(run.restored_step, state.best)
    if mode.continues_run(run.config):
        # Not earlier: an override that does not fit the checkpoint would stay in config.yaml.
        run.run_dir.write_config(run.config)
        step = run.restored_step if found is not None else -1
        run.monitor.resume_at(step, supervised_steps=run.trainer.supervised_steps)
        run.problems.bad_rows.restore(read_bad_rows(run.run_dir.bad_rows))
    elif found is None:
        raise ConfigError(
            f"resume={run.config.resume} has no checkpoint, so there is nothing of that run to evaluate: "
            "drop resume= to evaluate the model itself"
        )
    else:
        run.monitor.resume_at(-1, supervised_steps=0)  # replaces what an earlier evaluation of the same run recorded


def restore_position(run: Run, state: LoopState) -> None:
    """Continue with the problem after the last one that the checkpoint learned from.

    A checkpoint without a cursor was written by an older version, whose position followed from the run's config. If
    that config changes now, the checkpoint is written again, with its cursor, before config.yaml is.
    """
    made = {"version": run.trainer.version, "supervised_steps": run.trainer.supervised_steps}
    if run.restored_step not in made.values():
        raise CheckpointError(
            f"{run.checkpoints.path(run.restored_step)} was saved after {run.progress}, so the record of the run would "
            "not fit it: give the folder the name of its own step"
        )
    before = run.config if state.has_position else parse(typed(run.run_dir.read_config()))
    run.position = Position(Cursors.of(before, **made).restored(state))
    if run.curriculum is not None and state.difficulty is not None:
        run.curriculum.restore(state.difficulty)
    if not state.has_position and run.position.begun != Cursors.of(run.config, **made):
        run.checkpoints.save(run.restored_step, run.trainer, loop_state(run))
        run.checkpoints.finish()


def save_at_the_end(run: Run, mode: RunMode) -> None:
    """Save what the newest checkpoint does not hold, if the mode saves, and wait until it is written."""
    if mode.checkpoint_step is not None:
        save(run, mode.checkpoint_step(run.progress))
    run.checkpoints.finish()


def save_after(error: BaseException, run: Run, mode: RunMode) -> None:
    """Save the last finished step of a run that `error` ends. A step that is half done is not saved: the run then
    continues from the newest checkpoint, as after a kill. Another error on the way becomes a note of `error`."""
    try:
        if run.is_whole:
            save_at_the_end(run, mode)
        elif mode.checkpoint_step is not None:
            log.warning("%s was not finished, so no checkpoint of it is written", run.progress)
            run.checkpoints.finish()
    except VlmrlError as second:
        if second is not error:
            error.add_note(f"While saving: {second}")


def model_table(run: Run) -> dict[str, str]:
    """The model, for the screen."""
    config = run.config
    parameters = sum(p.numel() for p in run.policy.model.parameters()) + in_4_bits(run.policy.model)
    trainable = sum(p.numel() for p in run.policy.model.parameters() if p.requires_grad)
    return {
        "model": f"{config.model.name}: {parameters:,} parameters, {trainable:,} trainable, {config.model.dtype.value} "
        f"on {run.policy.device}" + ("" if run.rank_group is None else f", {run.rank_group.size} ranks"),
    }


def plan_table(run: Run) -> dict[str, str]:
    """What the numbers of the config add up to, for the screen."""
    config, orchestrator, warmup = run.config, run.config.orchestrator, run.config.trainer.warmup
    if config.mode in (Mode.serve, Mode.bench):  # they take no step, or other steps
        return model_table(run)
    rollouts = orchestrator.groups_per_step * orchestrator.group_size
    then, per_step = f"{rollouts} rollouts", f"{orchestrator.groups_per_step} groups × {orchestrator.group_size}"
    steps = {"rollouts per step": f"{per_step} = {rollouts}"}
    algorithm = f"{config.algorithm.loss}, {config.algorithm.advantage} advantages, credit by "
    algorithm += config.algorithm.credit.value
    if config.mode is Mode.dpo:
        steps, then = {}, f"{config.dpo.batch_size} pairs"
        algorithm = f"dpo, {config.dpo.loss.value} loss, beta {config.dpo.beta:g}, reference={config.reference.kind}"
    are_counted = config.dpo.from_run is None or config.trainer.max_epochs is None  # recorded pairs are read later
    supervised = run.steps if config.mode is Mode.sft else warmup.steps
    target, consecutive = orchestrator.eval.target, orchestrator.eval.consecutive
    return {
        **model_table(run),
        "task": f"{config.task.target.rpartition(':')[2]}, up to {most_turns(config.task)} turns",
        **steps,
        "tokens per rollout": f"up to {run.evaluator.runner.max_model_len}, {orchestrator.max_new_tokens} new per turn",
        "optimizer steps": f"{supervised} supervised × {warmup.batch_size} conversations"
        + ("" if config.mode is Mode.sft else f", then {f'{run.steps} × {then}' if are_counted else f'{then} a step'}")
        + ("" if config.trainer.max_epochs is None else f" ({config.trainer.max_epochs:g} passes over the rows)"),
        "algorithm": algorithm,
        "evaluation": f"{orchestrator.eval.problems} held-out problems, sampled and greedy, every "
        f"{orchestrator.eval.every} steps"
        + ("" if target is None else f"; done at {target} {consecutive} times in a row"),
    }
