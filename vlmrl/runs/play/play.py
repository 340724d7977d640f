"""`mode=play`: play episodes without a model, and see what the policy would see, and what it would be paid.

    problem ─▶ RolloutRunner, as in training ─▶ rollouts/, images/ ─▶ report.html
                   │ engine.py: a player answers in place of the model

A broken reward shows itself when one plays: the right answer is not paid, or a wrong one is. No weights are loaded.
Each episode is recorded as the one rollout of a step, so that the report, mode=replay and mode=faults read the folder.
Its tokens have no logprobs and no policy version, because no policy sampled them.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import closing

from vlmrl.config.algorithm import Truncated
from vlmrl.config.model import most_frames
from vlmrl.config.play import Player as PlayerName
from vlmrl.config.run import RunConfig
from vlmrl.config.task import most_turns
from vlmrl.models.checkpoints.load import resolve_checkpoint
from vlmrl.monitor.monitor import NO_REPORT
from vlmrl.monitor.report.background import ReportWriter
from vlmrl.orchestrator.rollout import RolloutRunner
from vlmrl.orchestrator.scoring import Scorer
from vlmrl.orchestrator.stream import Indices, ProblemStream
from vlmrl.orchestrator.task_threads import TaskThreads
from vlmrl.record.faults import FaultLog, faults_of
from vlmrl.record.logs import MainLog
from vlmrl.record.rollouts import RolloutRecorder
from vlmrl.record.run_dir import RunDir
from vlmrl.runs.build import RenderingParts, build_renderer
from vlmrl.runs.play.engine import PlayerEngine
from vlmrl.runs.play.envs import WatchedEnvs, WatchedToolbox
from vlmrl.runs.play.players import Person, Player, RandomPlayer, Script
from vlmrl.runs.play.screen import Screen
from vlmrl.runs.problems import max_model_len
from vlmrl.runs.stopping import Stop, stopping_on_signals
from vlmrl.runs.tools import make_toolbox, texts_of_run
from vlmrl.tasks.base import Split, Task
from vlmrl.tasks.loading import load_task
from vlmrl.tasks.mixture import MixedProblem
from vlmrl.trainer.loop_state import Cursor
from vlmrl.types import DropReason, Rollout


def play(config: RunConfig) -> int:
    """Play the episodes of `config.play`; returns the exit code, 1 where one of them failed. Raises VlmrlError."""
    task = load_task(config.task, seed=config.seed)
    parts = build_renderer(config, resolve_checkpoint(config.model, texts_of_run(config, task)))
    run_dir = RunDir(config.output_dir)
    with run_dir.lock(config.mode.name):
        run_dir.create()
        run_dir.write_config(config)
        run_dir.point_latest()
        started = time.monotonic()
        with MainLog(run_dir.main_log), closing(Record(run_dir, parts)) as record:
            rollouts, is_left = asyncio.run(_play(config, task, parts, record))
        run_dir.write_summary(
            {
                "exit_reason": "interrupted" if is_left else "finished",
                "wall_clock_s": time.monotonic() - started,
                "step": len(rollouts),
                "objective": None,
            }
        )
        if config.monitor.report:
            written = ReportWriter(run_dir).finish()
            print(f"\nreport  {run_dir.report}" if written else NO_REPORT)
    return int(any(rollout.stop_reason.is_fault for rollout in rollouts))


class Record:
    """Records each episode at once, so that nothing is lost where the next one ends the process."""

    def __init__(self, run_dir: RunDir, parts: RenderingParts) -> None:
        self.run_dir = run_dir
        self._faults = FaultLog(run_dir.faults)
        self._rollouts = RolloutRecorder(run_dir)
        self._rollouts.spell_with(parts.tokenizer)

    def close(self) -> None:
        """End the thread that writes."""
        self._rollouts.close()

    def episode(self, number: int, rollout: Rollout, *, is_left: bool) -> None:
        """Record episode `number`, from 1. An episode that the player left is no fault of the task."""
        if rollout.stop_reason.is_fault:
            rollout.dropped = DropReason.FAULT
            if not is_left:
                self._faults.write(faults_of(number, "rl", [rollout]))
        self._rollouts.write(number, {"train": [rollout]})
        self._rollouts.flush()


async def _play(config: RunConfig, task: Task, parts: RenderingParts, record: Record) -> tuple[list[Rollout], bool]:
    """The rollouts that came to their end, and whether the player left one after them."""
    stop, split = Stop(), _split(config)
    screen, max_turns = Screen(parts, record.run_dir.seen), most_turns(config.task)
    envs = WatchedEnvs(config.task, task, screen)
    engine = PlayerEngine(_player(config, task, stop), envs, parts.renderer, screen)
    runner = RolloutRunner(
        envs=envs,
        renderer=parts.renderer,
        engine=engine,
        seed=config.seed,
        max_turns=max_turns,
        max_new_tokens=config.orchestrator.max_new_tokens,
        max_model_len=max_model_len(config),
        max_frames=most_frames(config.model),
        truncated=config.algorithm.truncated,
        stop=tuple(config.orchestrator.stop),
        scorer=Scorer.of(config.reward, config.task, TaskThreads().run),
        tools=None if (toolbox := make_toolbox(config)) is None else WatchedToolbox(toolbox.tools, envs, screen),
    )
    problems = ProblemStream(task, split, Indices(Cursor(config.play.problem)), once=True)
    rollouts: list[Rollout] = []
    with stopping_on_signals(stop, lambda text: print("\nasked to stop: a second Ctrl-C ends the program at once")):
        while len(rollouts) < config.play.episodes and not engine.is_left:
            number = len(rollouts) + 1
            drawn = await problems.draw(number, 1)
            if not drawn:
                print(f"\nthe split has no more problems after {len(rollouts)} episodes")
                break
            problem = drawn[0].problem
            own_turns = problem.max_turns if isinstance(problem, MixedProblem) else max_turns
            screen.begin(number, split, drawn[0].index, own_turns)
            (group,) = await runner.run_groups(split=split, step=number, problems=drawn, group_size=1, temperature=1.0)
            (rollout,) = group.rollouts
            unpaid = rollout.is_cut and config.algorithm.truncated is Truncated.zero and rollout.reward > 0
            screen.end(rollout, is_left=engine.is_left, is_cut_unpaid=unpaid)
            if rollout.turns or not engine.is_left:
                record.episode(number, rollout, is_left=engine.is_left)
            if not engine.is_left:
                rollouts.append(rollout)
        await envs.stop()
    if len(rollouts) > 1:
        screen.summary(rollouts)
    return rollouts, engine.is_left


def _split(config: RunConfig) -> Split:
    return "train" if config.play.split.value == "train" else "eval"


def _player(config: RunConfig, task: Task, stop: Stop) -> Player:
    """Raises ConfigError for a scripted policy that cannot be called."""
    if config.play.policy == PlayerName.person:
        return Person(stop)
    if config.play.policy == PlayerName.random:
        return RandomPlayer(task, config.seed, stop)
    return Script(config.play.policy, stop)
